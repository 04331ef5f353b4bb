"""A run goes back to an earlier stage and forward again, and what follows starts from the stage that it holds."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import holdfast
from holdfast.config.gate import GateConfig
from holdfast.deploy.export import export
from holdfast.errors import ConfigError, GateFailed, RunDirectoryError
from holdfast.records.directory import current_stage, learned_stages, open_directory, rolled_back
from holdfast.records.gate import Check, judge
from holdfast.records.read import FinishedRun, read_run
from holdfast.records.stages import settled_stage
from holdfast.runner.reload import find_stage
from holdfast.runner.run import run
from holdfast.system.files import read_json, write_json
from holdfast.system.progress import Progress
from support.command import holdfast as command
from support.resumed import tensors
from support.tiny import tiny_config

QUIET = Progress(quiet=True)


def config(folder: Path, output: str, **changes: Any) -> dict[str, Any]:
    values = tiny_config(
        folder, method={"name": "replay", "ratio": 0.5, "capacity": 6}, output=str(folder / output), **changes
    )
    values["training"] = values["training"] | {"epochs": 2}
    return values


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("rollback")


@pytest.fixture(scope="module")
def finished(folder) -> Path:
    run(config(folder, "finished"), QUIET)
    return folder / "finished"


@pytest.fixture
def made(finished, tmp_path) -> Path:
    """A copy of a finished run of three stages, beside which its data lie."""
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def test_what_a_run_holds_follows_from_its_gate_and_its_rollbacks():
    gate = [{"stage": 2, "current": 1}, {"stage": 3, "current": 3}]
    record = {"gate": gate, "rollbacks": [{"after": 3, "to": 0, "at": ""}]}
    assert [current_stage(record, t) for t in range(5)] == [0, 1, 1, 0, 4]
    assert [learned_stages(record, t) for t in range(5)] == [[], [1], [1], [], [4]]
    record["rollbacks"] += [{"after": 3, "to": 2, "at": ""}, {"after": 4, "to": 4, "at": ""}]
    assert learned_stages(record, 3) == [1, 2] and learned_stages(record, 4) == [1, 2, 4]
    assert (rolled_back(record, 3), rolled_back(record, 4), rolled_back(record, 2)) == (2, 4, None)


def test_the_last_row_is_that_of_the_stage_that_is_held(made, finished):
    before = read_json(made / "matrix.json")
    matrix = holdfast.rollback(made, to=1, progress=QUIET)
    assert matrix == read_json(made / "matrix.json")
    assert matrix["scores"] == [*before["scores"][:3], before["scores"][1]]
    found = read_run(made)
    assert [found.stage_of(row) for row in range(4)] == [0, 1, 2, 1]
    assert found.responses(3, "blue") == found.responses(1, "blue")
    assert "was set to stage 1" in (made / "report.html").read_text()
    assert find_stage(made).number == export(made, made.parent / "out").stage == 1
    assert holdfast.rollback(made, to=0, progress=QUIET)["scores"][3] == before["scores"][0]
    assert find_stage(made).number == 0
    assert holdfast.rollback(made, to=3, progress=QUIET) == before
    assert tensors(made) == tensors(finished), "no stage is deleted"
    assert [(r["after"], r["to"]) for r in read_json(made / "run.json")["rollbacks"]] == [(3, 1), (3, 0), (3, 3)]


def test_the_stage_that_is_held_already_is_said_and_noted_once(made, capsys):
    for _ in range(2):
        assert command("rollback", made, "--to", 2) == 0
    said = capsys.readouterr().err.splitlines()
    assert said[0].endswith("holds stage 2 (green) now; it held stage 3 (blue)") and "already" in said[1]
    assert len(read_json(made / "run.json")["rollbacks"]) == 1


def test_the_same_command_as_before_trains_nothing_and_keeps_the_rollback(made, finished, folder):
    matrix = holdfast.rollback(made, to=2, progress=QUIET)
    assert run(config(folder, "finished") | {"output": str(made)}, QUIET) == matrix
    assert tensors(made) == tensors(finished)


@pytest.fixture(scope="module")
def stopped(folder) -> Path:
    """A run that its gate stopped."""

    def strict(found: FinishedRun, gate: GateConfig, row: int) -> list[Check]:
        """Whatever was forgotten is too much."""
        return judge(found, gate.model_copy(update={"max_task_forgetting": -1.0}), row)

    gate = {"max_task_forgetting": 1.0, "on_fail": "stop"}
    with pytest.MonkeyPatch.context() as patch, pytest.raises(GateFailed):
        patch.setattr("holdfast.runner.loop.judge", strict)
        run(config(folder, "stopped", gate=gate), QUIET)
    return folder / "stopped"


@pytest.mark.slow
def test_the_next_stage_starts_from_weights_and_memory_of_the_stage_that_is_held(stopped, folder, tmp_path):
    """Stage 3 is that of a run whose stage 2 is not there, whatever the gate would say of it."""
    shutil.copytree(stopped, made := tmp_path / "run")
    assert [d["action"] for d in read_json(made / "run.json")["gate"]][-1] == "stop"
    last = read_json(made / "run.json")["gate"][-1]["stage"]
    (made / "stages" / f"{last + 1:02d}-begun" / "checkpoint").mkdir(parents=True)
    holdfast.rollback(made, to=0, progress=QUIET)
    assert not (made / "stages" / f"{last + 1:02d}-begun").exists()
    again = config(folder, "stopped") | {"output": str(made)}
    run(again, QUIET)
    record = read_json(made / "run.json")
    assert learned_stages(record, 3) == list(range(last + 1, 4))
    memory = read_json(made / "stages" / "03-blue" / "method" / "replay.json")
    assert set(memory["tasks"]) == set(range(1, 4 - last)), "no row of an undone stage is rehearsed"


def test_a_task_that_is_appended_after_a_rollback_is_learned_from_the_stage_that_is_held(folder):
    """As if the undone stage had not been, but for the number of the stage, which its seed follows from."""
    values = config(folder, "grown")
    stream = values["stream"]
    run(values | {"stream": stream | {"order": ["red", "green"]}}, QUIET)
    holdfast.rollback(folder / "grown", to=1, progress=QUIET)
    matrix = run(values | {"stream": stream | {"order": ["red", "green", "blue"]}}, QUIET)
    found = read_run(folder / "grown")
    assert [found.stage_of(row) for row in range(4)] == [0, 1, 1, 3]
    assert learned_stages(found.info, 3) == [1, 3]
    assert matrix["scores"][2] == matrix["scores"][1] and matrix["scores"][2][2] is not None
    assert (folder / "grown" / "stages" / "01-red" / "responses" / "blue.jsonl").exists()
    memory = read_json(folder / "grown" / "stages" / "03-blue" / "method" / "replay.json")
    assert set(memory["tasks"]) == {1, 2}, "the second stage that counts is blue's"


def test_what_cannot_be_held_is_refused_and_nothing_changes(made, tmp_path, capsys):
    record = (made / "run.json").read_bytes()
    with pytest.raises(ConfigError, match=r"--to: 7 is no complete stage .* 0, 1, 2, 3"):
        holdfast.rollback(made, to=7, progress=QUIET)
    with open_directory(made):
        assert command("rollback", made, "--to", 1) == 2
    assert "in use by another process" in capsys.readouterr().err
    shutil.rmtree(made / "stages" / "01-red" / "model")
    with pytest.raises(RunDirectoryError, match="01-red: holds no weights to go back to"):
        holdfast.rollback(made, to=1, progress=QUIET)
    weights = made / "stages" / "02-green" / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(RunDirectoryError, match="is damaged"):
        holdfast.rollback(made, to=2, progress=QUIET)
    (made / "stages" / "03-blue" / "evaluation.json").unlink()
    with pytest.raises(RunDirectoryError, match=r"stage 3 \(blue\) is not measured and judged yet"):
        holdfast.rollback(made, to=0, progress=QUIET)
    assert (made / "run.json").read_bytes() == record
    with pytest.raises(RunDirectoryError, match="is no run's directory"):
        holdfast.rollback(tmp_path / "nowhere", to=0, progress=QUIET)
    assert not (tmp_path / "nowhere").exists()


def test_a_stage_is_settled_once_it_is_measured_and_judged(made):
    """Only then a server that follows the run takes it."""
    found = read_run(made)
    assert settled_stage(found) == 3
    found.info["config"]["gate"] = {"max_forgetting": 1.0}
    assert settled_stage(found) == 2, "stages that others follow were finished before there was a gate"
    for entry in found.info["stages"]:
        entry["config"] = entry["config"] | {"gate": {"max_forgetting": 1.0}}
    assert settled_stage(found) == 0
    found.info["gate"] = [{"stage": 1, "current": 1}, {"stage": 2, "current": 1}]
    assert settled_stage(found) == 1
    found.info["rollbacks"] = [{"after": 3, "to": 2, "at": ""}]
    assert settled_stage(found) == 2, "what its user decided needs no verdict"
    del found.info["config"]["gate"], found.info["gate"], found.info["rollbacks"]
    (made / "stages" / "03-blue" / "evaluation.json").unlink()
    assert settled_stage(found) == 2


def test_a_record_of_rollbacks_that_cannot_be_is_damage(made):
    (made / "manifest.jsonl").unlink()
    record = read_json(made / "run.json")
    for after, to in ((3, 4), (9, 1), (2, -1)):
        write_json(made / "run.json", record | {"rollbacks": [{"after": after, "to": to, "at": "now"}]})
        with pytest.raises(RunDirectoryError, match="rollbacks: after stage"):
            read_run(made)
    (made / "run.json").write_text(json.dumps(record | {"rollbacks": [{"after": "3"}]}))
    with pytest.raises(RunDirectoryError, match="rollbacks"):
        read_run(made)
