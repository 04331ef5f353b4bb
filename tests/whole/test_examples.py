"""The examples to copy: each runs as it stands, small and with a tiny model, and the list of them has all."""

from __future__ import annotations

import re
import runpy
import sys
from typing import Any

import pytest

import holdfast
from holdfast import load_config
from holdfast.deploy import serve
from holdfast.runner.run import run
from holdfast.system.files import read_json, read_jsonl
from holdfast.system.progress import Progress
from support.command import holdfast as command
from support.paths import ROOT
from support.sight import write_seeing
from support.tiny import tiny_config, write_chat_model, write_model

EXAMPLES = ROOT / "examples"
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
QUIET = Progress(quiet=True)
SHORT = ["training.max_steps=2", "evaluation.bootstrap=0", "evaluation.shift=0", "evaluation.max_new_tokens=2"]


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A place like the project's root, with a tiny model under the hub name that the examples have."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    for folder in ("docs", "examples"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    write_model(tmp_path / MODEL)
    return tmp_path


@pytest.fixture
def call(monkeypatch):
    """An example that is a script, called with arguments."""

    def called(name: str, *arguments: str) -> dict[str, Any]:
        monkeypatch.setattr(sys, "argv", [f"examples/{name}", *arguments])
        return runpy.run_path(f"examples/{name}", run_name="__main__")

    return called


def test_learn_every_month(root, call, monkeypatch, capsys):
    real = holdfast.learn
    monkeypatch.setattr(
        holdfast, "learn", lambda *data, **options: real(*data, **options, overrides=SHORT, progress=QUIET)
    )
    (root / "tickets").mkdir()
    for month in (1, 2):
        rows = (EXAMPLES.parent / "docs" / "tutorials" / f"tickets-2026-0{month}.csv").read_text().splitlines()
        (root / "tickets" / f"month-{month}.csv").write_text("\n".join(rows[:9]))
    call("learn-every-month.py", "tickets", "run", MODEL)
    told = capsys.readouterr().out.splitlines()
    figures = r"learned [+-]\d\.\d{3}, the general loss [+-]\d+\.\d%"
    assert [bool(re.fullmatch(f"month-{n}: {figures}", line)) for n, line in enumerate(told, 1)] == [True, True]


def test_gate_in_ci(root):
    tickets = "docs/tutorials/tickets-2026-01.csv"
    learn = ["learn", tickets, "--into", "run", "--config", "examples/gate-in-ci.yaml", *SHORT]
    assert command(*learn, "training.learning_rate=1e-12") == 3  # nothing was learned
    [decision] = read_json(root / "run" / "run.json")["gate"]
    assert [decision["action"], decision["current"]] == ["rollback", 0]


def test_serve_and_roll_back(tmp_path, monkeypatch, call, capsys):
    """It serves what the run holds; where the newest stage forgot too much, that is the one before."""
    served = []
    monkeypatch.setattr(serve, "_serve", lambda stored, *_: served.append(stored.folder.name))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(EXAMPLES)
    config = tiny_config(tmp_path)
    config["stream"]["order"] = ["red", "green"]
    run(config, QUIET)
    call("serve-and-roll-back.py", "run")
    call("serve-and-roll-back.py", "run")
    assert served == ["01-red", "01-red"]
    assert capsys.readouterr().out.count("green cost too much: back to stage 1") == 1


def test_learn_new_documents_and_keep_general_ability(root):
    write_chat_model(root / MODEL, context=256)
    short = [*SHORT, "method.length=16", "keep.rows=8", "evaluation.general=[{name: everyday, rows: 2}]"]
    matrix = run(load_config("examples/learn-new-documents-and-keep-general-ability.yaml", short), QUIET)
    assert matrix["metrics"] == {"handbook": "loss"} and len(matrix["general"]["everyday"]) == 2
    stage = read_json(root / "runs" / "handbook" / "stages" / "01-handbook" / "stage.json")
    assert [one["key"] for one in stage["keep"]["constraints"]] == ["general"]


def test_drop_in_trainer(root, call):
    names = call("drop-in-trainer.py", MODEL, "out")
    lines = [line for line in names["trainer"].state.log_history if "term/kl_replay" in line]
    assert lines and set(names["trainer"].forgetting_report()) == {"before", "after", "change", "texts"}


def test_compare_methods_with_seeds(root, capsys):
    assert command("sweep", "examples/compare-methods-with-seeds.yaml", "--dry-run") == 0
    assert "12 runs, 0 done, 0 begun" in capsys.readouterr().out


def test_my_own_method(tmp_path):
    """Its slow weights hold the fast ones back, and a pull of 0 changes no bit."""
    moved = {}
    for pull in (None, 0.0, 0.5):
        method = "sequential" if pull is None else {"name": str(EXAMPLES / "my-own-method.py"), "pull": pull}
        config = tiny_config(tmp_path, method=method, output=str(tmp_path / f"run-{pull}"))
        config["stream"]["order"] = ["red"]
        config["training"]["epochs"] = 2
        run(config, QUIET)
        lines = read_jsonl(tmp_path / f"run-{pull}" / "events.jsonl")
        moved[pull] = [line["loss"] for line in lines]
    assert moved[None] == moved[0.0] != moved[0.5]
    assert moved[0.5][-1] > moved[0.0][-1]


def test_vision_language(root):
    write_seeing(root / "HuggingFaceTB" / "SmolVLM-256M-Instruct")
    small = ["stream.options={size: 4, rooms: 2}", "training.batch_size=2", "evaluation.general=[]"]
    assert command("check", "examples/vision-language.yaml", *small) == 0


def test_preferences(root, capsys):
    pytest.importorskip("trl", reason="TRL is not installed")
    assert command("check", "examples/preferences.yaml") == 0
    assert "preference" in capsys.readouterr().out


@pytest.mark.slow
def test_preferences_run(root):
    pytest.importorskip("trl", reason="TRL is not installed")
    matrix = run(load_config("examples/preferences.yaml", SHORT), QUIET)
    assert matrix["metrics"] == {"facts": "accuracy", "tone": "preference"}


def test_the_list_has_every_example():
    listed = set(re.findall(r"\]\(([\w.-]+)\)", (EXAMPLES / "README.md").read_text(encoding="utf-8")))
    there = {path.name for path in EXAMPLES.iterdir() if path.is_file()} - {"README.md"}
    assert there <= listed and len(there) >= 8
