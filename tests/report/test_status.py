"""What `holdfast status` says of a run: its stages, what each learned and cost, the current one, what comes next."""

from __future__ import annotations

import json
import shutil
from io import StringIO
from pathlib import Path

import pytest

import holdfast
from holdfast.records.read import read_run
from holdfast.report.status import _Stages, show
from holdfast.scoring import SCORERS
from holdfast.system.files import read_json, write_json
from holdfast.system.progress import Progress
from holdfast.system.terminal import open_console
from support.command import holdfast as command
from support.paths import ROOT

OLD = ROOT / "tests" / "golden" / "old_runs"


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """A finished run of two stages, whose gate passed both."""
    shutil.copytree(OLD / "full-ewc" / "run", tmp_path / "run")
    return tmp_path / "run"


def test_each_stage_has_what_it_learned_and_cost(made: Path):
    found = holdfast.status(made)
    scores = read_json(made / "matrix.json")["scores"]
    one, two = found["stages"]
    assert found["current"] == 2 and found["finished"] and found["tuner"] == "full"
    assert (one["state"], two["state"]) == ("kept", "current")
    assert one["learned"] == pytest.approx(scores[1][0] - scores[0][0])
    assert two["learned"] == pytest.approx(scores[2][1] - scores[1][1])
    assert one["interval"][0] <= one["learned"] <= one["interval"][1] and one["is_learned"]
    assert one["forgetting"] is None and two["forgetting"] == pytest.approx(scores[1][0] - scores[2][0])
    assert one["gate"] == two["gate"] == "passed" and one["seconds"] > 0
    assert json.loads(json.dumps(found)) == found, "plain values"
    assert any("rollback" in step["command"] and step["command"].endswith("--to 1") for step in found["next"])


def test_what_comes_next_is_what_the_run_can_take(made: Path):
    """Of a configuration: a task more; learn takes a run over, and from then on it alone goes on."""

    def first(count: int) -> list[tuple[str, str]]:
        return [(step["command"], step["what"]) for step in holdfast.status(made)["next"][:count]]

    run, learn = f"holdfast run CONFIG (output={made})", f"holdfast learn DATA --into {made}"
    assert first(2) == [
        (run, "learn a task that you append to the stream of CONFIG"),
        (learn, "or let learn take it over; CONFIG cannot continue it then"),
    ]
    record = read_json(made / "run.json")
    write_json(made / "learn.json", {"format": 1, "memory": True, "given": {}, "settled": {}, "own": {}, "tasks": []})
    assert first(1) == [(learn, "teach it the next data")]
    write_json(made / "run.json", record | {"finished": None})
    assert first(1) == [(learn, "go on; the data as before")]
    (made / "learn.json").unlink()
    named = record["config"] | {"stream": {"name": "trace", "path": "data", "order": None}}
    write_json(made / "run.json", record | {"config": named})
    assert not any(command.startswith(("holdfast run", "holdfast learn")) for command, _ in first(9))


def test_one_test_row_says_nothing(made: Path, capsys: pytest.CaptureFixture[str]):
    for file in made.glob("stages/*/responses/*.jsonl"):
        file.write_text(file.read_text().splitlines()[0] + "\n")
    record = read_json(made / "run.json")
    tasks = {name: facts | {"test": 1} for name, facts in record["tasks"].items()}
    write_json(made / "run.json", record | {"tasks": tasks})
    assert [(s["interval"], s["is_learned"]) for s in holdfast.status(made)["stages"]] == [(None, False)] * 2
    assert command("status", made) == 0 and capsys.readouterr().out.count(", one test row says nothing") == 2


def test_scores_of_different_scales_have_no_common_mean(made: Path, capsys: pytest.CaptureFixture[str]):
    """An accuracy and a loss: each has a mean of its own."""
    stages = _Stages(read_run(made), [0, 1, 2])
    assert stages._mean_changes(1, 2, [0]).keys() == {"fraction"}
    stages.own.matrix["scores"][1:] = [[0.5, 0.25], [0.25, 2.25]]
    stages.own.scorers["green"] = SCORERS["loss"]
    assert stages._mean_changes(1, 2, [0, 1]) == {"fraction": -0.25, "loss": -2.0}
    found = holdfast.status(made)
    found["stages"][1] |= {"forgetting": None, "forgetting_by_scale": {"fraction": 0.25, "loss": 2.0}}
    show(found)
    assert "forgetting +0.250 fraction, +2.000 loss" in capsys.readouterr().out


def test_a_stage_says_whether_it_kept_its_budget(made: Path, capsys: pytest.CaptureFixture[str]):
    lost = {"key": "general", "task": None, "lost": 0.03, "interval": [0.02, 0.04], "budget": 0.02, "kept": False}
    held = {"key": "tasks", "task": "red", "lost": 0.0, "interval": [0.0, 0.0], "budget": 0.1, "kept": True}
    verdicts = [
        {"constraints": [held], "kept": True, "share": 1.0},
        {"constraints": [lost, held], "kept": False, "share": 1.0},
    ]
    for file, verdict in zip(sorted(made.glob("stages/0[12]-*/stage.json")), verdicts, strict=True):
        write_json(file, read_json(file) | {"keep": verdict})
    assert [stage["keep"] for stage in holdfast.status(made)["stages"]] == verdicts
    assert command("status", made) == 0
    one, two = [line for line in capsys.readouterr().out.splitlines() if line.startswith("stage")]
    assert one.endswith("  budget kept") and two.endswith("  budget not kept: general lost 0.030 of 0.020")
    console = open_console(width=80, force_terminal=True, file=StringIO(), color_system=None)
    show(holdfast.status(made), console)
    assert "budget" in console.file.getvalue()  # type: ignore[attr-defined]
    broken = read_json(file) | {"keep": {"constraints": [{"lost": "much"}], "share": 1.0}}
    write_json(file, broken)
    assert command("status", made) == 2 and "keep" in capsys.readouterr().err


def test_an_undone_stage_keeps_what_it_learned_by_its_own_weights(made: Path):
    before = holdfast.status(made)["stages"][1]
    holdfast.rollback(made, to=1, progress=Progress(quiet=True))
    found = holdfast.status(made)
    assert found["current"] == 1
    assert [stage["state"] for stage in found["stages"]] == ["current", "undone"]
    assert found["stages"][1] == before | {"state": "undone"}
    assert any("--to 0" in step["command"] for step in found["next"])


def test_a_stage_that_is_at_work_says_how_far_it_is(capsys: pytest.CaptureFixture[str]):
    found = holdfast.status(OLD / "lora-replay" / "run")
    assert [stage["state"] for stage in found["stages"]] == ["kept", "current", "training"]
    assert found["stages"][2]["step"] == 10 and found["stages"][2]["learned"] is None
    assert command("status", OLD / "lora-replay" / "run") == 0
    said = capsys.readouterr().out
    assert "stage 3  blue  training, step 10\n" in said and "stage 2  green  current  learned +0.875" in said


def test_the_table_fits_80_columns_whatever_the_tasks_are_called(made: Path):
    found = holdfast.status(made)
    found["stages"][0] |= {"task": "a-name-" * 12, "gate": "failed: rolled back to the model before training"}
    found["stages"][0] |= {"general_change": -0.123, "general_loss": 0.5}
    found["stages"][0] |= {"interval": None, "is_learned": False, "test_rows": 1}
    found["stages"][1] |= {"learned": -0.01, "interval": [-0.1, 0.1], "is_learned": False}
    console = open_console(width=80, force_terminal=True, file=StringIO(), color_system=None)
    show(found, console)
    table = console.file.getvalue().partition("holdfast run")[0].splitlines()[2:]  # type: ignore[attr-defined]
    assert max(map(len, table)) <= 80
    text = "".join("".join(table).split())
    for part in (
        "a-name-",
        "learned",
        "forgetting",
        "minutes",
        "−0.010",
        "-0.10..0.10",
        "+50.0%",
        "−0.123",
        "onetestrow",
    ):
        assert part in text, part


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("run.json", None, "is no run's directory"),
        ("matrix.json", None, "matrix.json is missing"),
        ("matrix.json", "{}", "is damaged"),
        ("run.json", '{"config": {}, "seed": 0, "engine": "e", "started": ""}', "of the laboratory"),
    ],
)
def test_what_is_no_run_is_one_message(made: Path, name: str, content: str | None, message: str, capsys):
    (made / name).unlink()
    if content is not None:
        (made / name).write_text(content)
    if "laboratory" in message:
        (made / "matrix.json").unlink()
    assert command("status", made) == 2
    assert message in capsys.readouterr().err


def test_scores_that_were_not_measured_are_left_out(made: Path, capsys: pytest.CaptureFixture[str]):
    matrix = read_json(made / "matrix.json")
    matrix["scores"] = [[None, None], [None, 0.5], [None, None]]
    write_json(made / "matrix.json", matrix)
    found = holdfast.status(made)
    assert [(s["learned"], s["is_learned"], s["forgetting"]) for s in found["stages"]] == [(None, None, None)] * 2
    assert command("status", made) == 0 and "learned" not in capsys.readouterr().out
