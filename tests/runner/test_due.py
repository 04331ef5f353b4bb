"""What is measured after each stage, where not all is: the cells that are measured are those of the whole matrix."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from holdfast import run
from holdfast.config.run import load_config
from holdfast.errors import ConfigError
from holdfast.records.directory import RunDirectory
from holdfast.records.read import read_run
from holdfast.report.status import status
from holdfast.report.text import lacking
from holdfast.runner.setup import prepare, resolve
from holdfast.runner.unmoved import unmoved_since
from holdfast.system.progress import Progress
from support.command import holdfast
from support.resumed import tensors
from support.tiny import tiny_config

QUIET = Progress(quiet=True)
TASKS = ["red", "green", "blue"]
MEASURED = {  # [when][row] the tasks
    "learned": [[0], [0, 1], [0, 1, 2], [0, 1, 2]],
    "last": [[0], [0, 1], [1, 2], [0, 1, 2]],
}


def configuration(folder: Path, output: str, **settings: Any) -> dict[str, Any]:
    config = tiny_config(folder)
    (folder / "wiki.txt").write_text("A cat sat on a mat.\nA dog ran home.\n")
    config["stream"]["order"] = TASKS
    config["evaluation"] |= {"bootstrap": 20, "general": [{"name": "wiki", "path": str(folder / "wiki.txt")}]}
    config["evaluation"] |= settings
    return config | {"output": str(folder / output)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A run that measures everything, and two that leave something out."""
    path = tmp_path_factory.mktemp("due")
    run(configuration(path, "all"), QUIET)
    run(configuration(path, "learned", when="learned"), QUIET)
    run(configuration(path, "last", when="last", general_when="last"), QUIET)
    return path


@pytest.mark.parametrize("when", ["learned", "last"])
def test_what_is_measured_is_what_the_whole_matrix_has(folder, when):
    whole, part = (json.loads((folder / name / "matrix.json").read_text()) for name in ("all", when))
    for row, (scores, measured) in enumerate(zip(part["scores"], MEASURED[when], strict=True)):
        assert scores == [score if j in measured else None for j, score in enumerate(whole["scores"][row])]
    [values], [expected] = part["general"].values(), whole["general"].values()
    assert values == (expected if when == "learned" else [expected[0], None, None, expected[3]])
    lost = {"forward_transfer"} | ({"forgetting"} if when == "last" else set())
    for figure, value in part["summary"].items():
        assert value == (None if figure in lost else whole["summary"][figure]), figure
    assert tensors(folder / when) == tensors(folder / "all")


def test_a_figure_that_was_left_out_says_why(folder):
    assert lacking(read_run(folder / "last")) == [
        "forgetting is null: no score of red after stage 2; evaluation.when: last left it out, and --backfill measures "
        "it.",
        "forward_transfer is null: no score of green before training, blue before training; evaluation.when: last left "
        "it out, and --backfill measures it.",
    ]


def test_page_status_gate_and_comparison_bear_what_was_left_out(folder):
    for command in (
        ["report", str(folder / "last"), "-o", str(folder / "page.html")],
        ["status", str(folder / "last")],
        ["compare", str(folder / "all"), str(folder / "last"), "--allow-different"],
        ["gate", str(folder / "last"), "--min-average", "0"],
    ):
        assert holdfast(*command) == 0, command
    assert [stage["seconds"] > 0 for stage in status(folder / "last")["stages"]] == [True] * 3


def test_backfill_measures_what_was_left_out(folder, tmp_path):
    shutil.copytree(folder / "last", tmp_path / "last")
    config = configuration(folder, "last", when="last", general_when="last") | {"output": str(tmp_path / "last")}
    assert run(config, QUIET, backfill=True) == json.loads((folder / "all" / "matrix.json").read_text())


def test_a_run_that_goes_back_measures_the_next_task_with_the_older_weights(folder):
    config = configuration(folder, "back", when="last", general_when="last")
    config["gate"] = {"min_new_task": 1.1, "on_fail": "rollback"}
    matrix = run(config, QUIET)
    whole = json.loads((folder / "all" / "matrix.json").read_text())
    assert matrix["scores"] == [whole["scores"][0]] * 4, "all rows are those of the model before training"


def test_a_gate_that_needs_what_is_left_out_is_refused(folder):
    for settings, limit, key in (
        ({"when": "last"}, {"max_forgetting": 0.1}, "evaluation.when"),
        ({"when": "last"}, {"min_average": 0.1}, "evaluation.when"),
        ({"general_when": "last"}, {"max_general_loss_increase": 0.1}, "evaluation.general_when"),
    ):
        config = configuration(folder, "refused", **settings) | {"gate": limit}
        with pytest.raises(ConfigError, match=rf"gate\.{next(iter(limit))}: needs .*{key}: last leaves"):
            prepare(resolve(load_config(config)))


def test_a_stage_that_moved_no_weight_has_the_results_of_the_one_before(tmp_path, monkeypatch):
    """The same run, measured after every stage and not, has the same figures and files."""

    def start(output: str) -> dict[str, Any]:
        config = configuration(tmp_path, output, shift=0)
        config["training"] |= {"learning_rate": 1e-60, "max_steps": 1}
        return run(config, QUIET)

    taken = start("taken")
    monkeypatch.setattr("holdfast.runner.unmoved.noted_alike", lambda *_: False)
    assert start("measured") == taken
    stages = sorted(path.name for path in (tmp_path / "taken" / "stages").iterdir())
    same = {}
    for stage in stages:
        ours, theirs = (tmp_path / name / "stages" / stage for name in ("taken", "measured"))
        for file in (ours / "responses").iterdir():
            assert file.read_bytes() == (theirs / "responses" / file.name).read_bytes()
        found, measured = (json.loads((folder / "evaluation.json").read_text()) for folder in (ours, theirs))
        assert found["general_examples"] == measured["general_examples"]
        same[stage] = found.get("same_as")
    assert list(same.values()) == [None, None, 1, 2]


def test_weights_that_moved_or_methods_that_act_at_test_time_are_measured(folder):
    for stage in sorted((folder / "all" / "stages").iterdir()):
        assert "same_as" not in json.loads((stage / "evaluation.json").read_text())
    setup = prepare(resolve(load_config(configuration(folder, "all"))))
    directory, second = RunDirectory(folder / "all"), setup.stages[1]
    assert unmoved_since(setup, directory, second) is None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("holdfast.runner.unmoved.noted_alike", lambda *_: True)
        assert unmoved_since(setup, directory, second) is setup.stages[0]
        patch.setattr(type(setup.methods[0]), "ask", lambda self, evaluation, task, example, fits: example)
        assert unmoved_since(setup, directory, second) is None
