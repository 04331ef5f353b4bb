"""Options that would have no effect, empty arguments and outputs that cannot be are told with exit code 2."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from support.command import holdfast
from support.paths import GOLDEN

RUN = GOLDEN / "old_runs" / "full-ewc" / "run"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("evaluate run --timeout 3", "--timeout: is about an endpoint; give --endpoint, too"),
        ("evaluate run --model x", "--model: is about an endpoint"),
        ("doctor --batch-size 2", "--batch-size: is about a model; give MODEL, too"),
        ("streams trace --metrics", "NAME: has nothing to do with --metrics"),
        ("replay corpus --inspect --tokens 9", "--tokens: is about a corpus to write"),
        ("replay corpus --inspect --no-chat", "--chat: is about a corpus to write"),
        (
            "replay model --tokens 9 --out x -o page.html",
            "--output: is about the page of a corpus; give --inspect, too",
        ),
        ("run config.yaml --port 8000", "--port, --no-browser: are for --open"),
        ("lab experiment --dry-run", "--dry-run: is about an experiment; name one"),
        ("lab experiment --scale huge", "--scale: no experiment has a scale 'huge'; known: tiny, paper"),
        ("lab experiment regression_1d --dry-run --redraw", "--redraw: does nothing with --dry-run"),
        ("lab experiment regression_1d --redraw --seeds 3", "--seeds: does nothing with --redraw"),
        ("gate run --junit x --markdown x --max-forgetting 1", "--junit, --markdown, --comment: need a file each"),
        ("gate run --comment x --page https://a<b>", "--page: must be an address"),
    ],
)
def test_an_option_without_effect_is_refused(line: str, said: str, capsys: Any) -> None:
    assert holdfast(*line.split()) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["status", ""], "the argument after status: is empty"),
        (["export", "run", "--to", " "], "the argument after --to: is empty"),
        (["learn", "--into=", "a"], "--into=: is empty"),
        ([""], "the first argument: is empty"),
    ],
)
def test_an_empty_argument_is_no_folder(arguments: list[str], said: str, capsys: Any) -> None:
    assert holdfast(*arguments) == 2
    assert f"{said}; is a variable of the shell not set?" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["report {run} -o", "compare {run} -o", "gate {run} --max-forgetting 1 --junit"])
def test_a_page_cannot_be_a_folder(command: str, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    assert holdfast(*command.format(run=RUN).split(), ".") == 2
    assert ".: is a folder; name a file in it" in capsys.readouterr().err


def test_a_path_below_a_file_is_told(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    assert holdfast("demo", "-o", tmp_path / "mine.txt") == 2
    assert "mine.txt" in (said := capsys.readouterr().err) and "Not a directory" in said
