"""Run directories of version 0.1.0 go on and are read; tests/golden/old_runs/README.md says what they hold."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from holdfast.config.run import load_config
from holdfast.errors import RunDirectoryError
from holdfast.records.directory import RunDirectory
from holdfast.records.read import read_run
from holdfast.runner.begun import as_begun
from holdfast.runner.setup import resolve
from holdfast.system.files import read_json, read_jsonl, write_json
from holdfast.system.machine import hardware, versions
from support.command import holdfast
from support.json_files import json_below
from support.paths import GOLDEN
from support.served import Server
from support.tiny import write_tasks

pytest.importorskip("starlette", reason="needs the extra [serve]")

OLD_RUNS = GOLDEN / "old_runs"
UNFINISHED, FINISHED = "lora-replay", "full-ewc"


@pytest.fixture
def place(tmp_path, monkeypatch, request) -> Path:
    """A copy of the run that the test names, as the working directory."""
    shutil.copytree(OLD_RUNS / request.param, tmp_path / "place")
    monkeypatch.chdir(tmp_path / "place")
    return tmp_path / "place"


def rounding(run: Path) -> float:
    """How far apart numbers of this machine and of the run may be: processors of one name differ in the last bits."""
    record = read_json(run / "run.json")
    libraries = {name: version for name, version in versions().items() if name != "holdfast"}
    alike = libraries.items() <= record["versions"].items() and hardware()["cpu"] == record["hardware"]["cpu"]
    return 1e-4 if alike else 0.02


def assert_holds(found: Any, expected: Any, tolerance: float, where: str = "") -> None:
    """``found`` has everything that is expected, and may have further keys; numbers agree to a share of themselves."""
    if isinstance(expected, dict):
        assert isinstance(found, dict) and expected.keys() <= found.keys(), where
        for key, value in expected.items():
            assert_holds(found[key], value, tolerance, f"{where}.{key}")
    elif isinstance(expected, list):
        assert isinstance(found, list) and len(found) == len(expected), where
        for place, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert_holds(one, other, tolerance, f"{where}[{place}]")
    elif isinstance(expected, float) and tolerance:
        near = math.isclose(found, expected, rel_tol=tolerance, abs_tol=2 * tolerance)
        assert near, f"{where}: {found}, not {expected}"
    else:
        assert found == expected, f"{where}: {found}, not {expected}"


def timeless(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in event.items() if key != "tokens_per_second"} for event in events]


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("place", [UNFINISHED], indirect=True)
def test_an_unfinished_run_ends_as_it_would_have(place, capsys):
    tolerance = rounding(place / "run")
    assert holdfast("run", "config.yaml") == 0
    assert "stage 3/3 blue: continues from step 8" in capsys.readouterr().err
    expected, stage = place / "expected", place / "run" / "stages" / "03-blue"
    assert_holds(read_json(place / "run" / "matrix.json"), read_json(expected / "matrix.json"), tolerance)
    events = timeless(read_jsonl(place / "run" / "events.jsonl"))
    assert_holds(events, timeless(read_jsonl(expected / "events.jsonl")), tolerance)
    tensors, wanted = (load_file(f / "adapter_model.safetensors") for f in (stage / "adapter", expected))
    assert tensors.keys() == wanted.keys()
    for name, tensor in tensors.items():
        torch.testing.assert_close(tensor, wanted[name], rtol=3 * tolerance, atol=3 * tolerance)
    assert not (stage / "checkpoint").exists()
    assert read_json(place / "run" / "run.json")["finished"]
    json_below(place / "run")


@pytest.mark.parametrize("place", [UNFINISHED], indirect=True)
def test_without_a_dropout_of_its_own_it_keeps_the_former_default(place):
    """A run of 0.1.0 that names no dropout had 0.05; a new one has none, and says so in its record."""
    config = load_config("config.yaml", ["tuner={name: lora, r: 4}"])
    assert resolve(config).tuner.options.lora_dropout == 0 and resolve(config).config.tuner.lora_dropout == 0
    record = read_json(Path("run", "run.json"))
    del record["config"]["tuner"]["lora_dropout"]
    write_json(Path("run", "run.json"), record)
    directory = RunDirectory(Path("run"))
    resolved = resolve(as_begun(config, directory.record))
    directory.check_config(resolved.config)
    model = resolved.tuner.prepare(AutoModelForCausalLM.from_pretrained("model"))
    assert model.peft_config["default"].lora_dropout == 0.05
    for name in ("lora_dropout=0.0", "lora_dropout=0.1"):
        other = resolve(as_begun(load_config("config.yaml", [f"tuner.{name}"]), directory.record))
        with pytest.raises(RunDirectoryError, match="lora_dropout"):
            directory.check_config(other.config)


@pytest.mark.parametrize("place", [FINISHED], indirect=True)
def test_a_finished_run_trains_nothing(place):
    stages, matrix = files(place / "run" / "stages"), read_json(place / "run" / "matrix.json")
    assert holdfast("run", "config.yaml") == 0
    assert files(place / "run" / "stages") == stages
    assert_holds(read_json(place / "run" / "matrix.json"), matrix, tolerance=0.0)


@pytest.mark.parametrize("place", [UNFINISHED, FINISHED], indirect=True)
def test_it_grows(place):
    before, known = files(place / "run" / "stages" / "01-red"), read_json(place / "run" / "run.json")["tasks"]
    write_tasks(place / "tasks", ("pink",))
    assert holdfast("run", "config.yaml", f"stream.order=[{', '.join([*known, 'pink'])}]") == 0
    assert files(place / "run" / "stages" / "01-red") == before
    record, matrix = (read_json(place / "run" / name) for name in ("run.json", "matrix.json"))
    assert [stage["task"] for stage in record["stages"]] == matrix["tasks"] == [*known, "pink"]
    assert record["stages"][0]["started"] is None and record["stages"][0]["versions"]["holdfast"] == "0.1.0"
    assert [row[-1] is None for row in matrix["scores"]] == [True, True, *[False] * (len(known))]
    assert matrix["by_task"]["learned"][-1] is not None and matrix["by_task"]["forward_transfer"][-1] is None


@pytest.mark.parametrize(("place", "stage"), [(UNFINISHED, 2), (FINISHED, 2)], indirect=["place"])
def test_reports_exports_and_evaluations_read_it(place, stage, capsys):
    assert holdfast("report", "run") == 0
    assert (place / "run" / "report.html").stat().st_size > 100_000
    assert holdfast("export", "run", "--to", "exported") == 0
    assert (place / "exported" / "README.md").is_file()
    assert holdfast("evaluate", "run", "--stage", stage) == 0
    assert "responses" in capsys.readouterr().out
    run, tasks = read_run(Path("run")), read_json(place / "run" / "matrix.json")["tasks"]
    [folder] = (place / "run" / "evaluations").iterdir()
    for j, task in enumerate(tasks):
        scores = [row["score"] for row in read_jsonl(folder / "responses" / f"{task}.jsonl")]
        assert sum(scores) / len(scores) == pytest.approx(run.scores[stage][j])
        assert read_jsonl(folder / "responses" / f"{task}.jsonl") == run.responses(stage, task)


@pytest.mark.parametrize(("place", "name"), [(UNFINISHED, "02-green"), (FINISHED, "02-green")], indirect=["place"])
def test_it_is_served(place, name):
    row = read_run(Path("run")).responses(2, "red")[0]
    server = Server(Path("run"))
    try:
        served = httpx2.get(f"{server.url}/models").json()["data"]
        assert [model["id"] for model in served] == [f"run/{name}"]
        asked = {"model": f"run/{name}", "messages": [{"role": "user", "content": row["prompt"]}], "max_tokens": 3}
        reply = httpx2.post(f"{server.url}/chat/completions", json=asked, timeout=60).json()
        assert reply["choices"][0]["message"]["content"].strip() == row["response"].strip()
    finally:
        server.stop()


@pytest.mark.parametrize("place", [FINISHED], indirect=True)
def test_its_gate_is_checked_again(place, capsys):
    assert holdfast("gate", "run", "--max-forgetting", "0.5") == 3
    assert "0.750" in capsys.readouterr().out
    assert holdfast("gate", "run", "--max-forgetting", "0.8") == 0
