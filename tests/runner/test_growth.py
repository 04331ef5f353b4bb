"""A run whose stream grows: it equals the run that had all tasks at once, and says what was never measured."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from holdfast import load_config, run
from holdfast.errors import ConfigError, RunDirectoryError
from holdfast.records.growth import Past
from holdfast.records.read import read_run
from holdfast.report.text import lacking
from holdfast.runner.setup import prepare, resolve
from holdfast.sweep.plan import is_done
from holdfast.system.files import read_json
from holdfast.system.progress import Progress
from support.command import holdfast
from support.resumed import finish, results, start, tensors
from support.tiny import tiny_config

QUIET = Progress(quiet=True)
TASKS = ["red", "green", "blue"]


def configuration(folder: Path, output: str, tasks: list[str], **changes: Any) -> dict[str, Any]:
    config = tiny_config(folder, method=["replay", {"name": "ewc", "samples": 4}])
    config["stream"]["order"] = tasks
    config["training"] |= {"epochs": 2}
    config["evaluation"] |= {"bootstrap": 20}
    return config | {"output": str(folder / output)} | changes


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Runs of all tasks at once (whole), of the first two (short), and of these with the third appended (grown)."""
    path = tmp_path_factory.mktemp("growth")
    run(configuration(path, "whole", TASKS), QUIET)
    run(configuration(path, "short", TASKS[:2]), QUIET)
    shutil.copytree(path / "short", path / "grown")
    run(configuration(path, "grown", TASKS), QUIET)
    return path


@pytest.fixture
def short(folder, tmp_path) -> Path:
    """A copy of the run of the first two tasks, below a folder with the same model and tasks."""
    for path in ("model", "tasks"):
        shutil.copytree(folder / path, tmp_path / path)
    shutil.copytree(folder / "short", tmp_path / "run")
    record = tmp_path / "run" / "run.json"
    record.write_text(record.read_text().replace(str(folder), str(tmp_path)))
    (tmp_path / "run" / "manifest.jsonl").unlink()
    return tmp_path


def test_a_grown_run_equals_the_run_of_all_tasks_at_once(folder):
    whole, grown = results(folder / "whole"), results(folder / "grown")
    assert grown["weights"] == whole["weights"] and grown["steps"] == whole["steps"]
    for name, rows in grown["responses"].items():
        assert rows == whole["responses"][name]
    missing = {f"stages/{stage}/responses/blue.jsonl" for stage in ("00-start", "01-red")}
    assert whole["responses"].keys() - grown["responses"].keys() == missing


def test_an_appended_task_is_null_before_it_came_and_its_figures_say_why(folder):
    whole, grown = (read_json(folder / name / "matrix.json") for name in ("whole", "grown"))
    for t, row in enumerate(whole["scores"]):
        assert grown["scores"][t] == (row if t >= 2 else [*row[:2], None])
    differing = {key for key, value in whole["summary"].items() if grown["summary"][key] != value}
    assert differing <= {"forward_transfer"} and grown["summary"]["forward_transfer"] is None
    assert "blue" in grown["missing"]["forward_transfer"] and "before training" in grown["missing"]["forward_transfer"]
    assert grown["by_task"]["forward_transfer"][1:] == [whole["by_task"]["forward_transfer"][1], None]
    assert grown["by_task"]["learned"] == whole["by_task"]["learned"]
    assert grown["intervals"] == whole["intervals"] | {"forward_transfer": None}


def test_run_json_tells_each_stage_and_how_the_run_grew(folder):
    short, grown = (read_json(folder / name / "run.json") for name in ("short", "grown"))
    assert [stage["task"] for stage in short["stages"]] == TASKS[:2] and "grown" not in short
    assert grown["stages"][:2] == short["stages"] and len(grown["stages"]) == 3
    assert [stage["config"]["stream"]["order"] for stage in grown["stages"]] == [TASKS[:2], TASKS[:2], TASKS]
    for number, stage in enumerate(grown["stages"], start=1):
        assert stage["stage"] == number and stage["started"] <= stage["finished"]
        assert stage["fingerprint"] == grown["tasks"][stage["task"]]["fingerprint"]
        assert stage["versions"] == grown["versions"]
    [growth] = grown["grown"]
    assert growth["tasks"] == ["blue"] and growth["after"] == 2
    assert list(grown["tasks"]) == TASKS and grown["config"]["stream"]["order"] == TASKS
    assert grown["stream"] == read_json(folder / "whole" / "run.json")["stream"]
    assert grown["finished"] is not None


def test_costs_are_those_of_all_stages(folder):
    record = read_json(folder / "grown" / "run.json")
    stages = [read_json(path) for path in sorted((folder / "grown").glob("stages/*/stage.json"))]
    measured = [read_json(path) for path in sorted((folder / "grown").glob("stages/*/evaluation.json"))]
    assert record["seconds"]["train"] == sum(stage["seconds"] for stage in stages)
    assert record["seconds"]["evaluate"] == sum(one["seconds"] for one in measured)
    assert record["tokens"] == sum(stage["tokens"] for stage in stages)
    before = read_json(folder / "short" / "stages" / "02-green" / "evaluation.json")["seconds"]
    assert measured[2]["seconds"] > before, "measuring the appended task took time, too"


def test_backfill_gives_the_whole_matrix(folder, tmp_path):
    shutil.copytree(folder / "grown", tmp_path / "grown")
    config = configuration(folder, "grown", TASKS) | {"output": str(tmp_path / "grown")}
    matrix = run(config, QUIET, backfill=True)
    whole = read_json(folder / "whole" / "matrix.json")
    assert matrix == whole and matrix["missing"].keys() <= {"harmonic_mean", "general_change"}
    assert tensors(tmp_path / "grown") == tensors(folder / "grown")
    assert read_json(tmp_path / "grown" / "run.json")["finished"] is not None


def test_settings_of_training_may_differ_for_new_stages_and_only_for_these(short):
    config = configuration(short, "run", TASKS)
    config["training"] |= {"epochs": [2, 2, 1], "learning_rate": 1e-3}
    with pytest.raises(RunDirectoryError, match=r"(?s)training\.learning_rate: 0\.03 -> 0\.001"):
        run(configuration(short, "run", TASKS[:2]) | {"training": config["training"] | {"epochs": 2}}, QUIET)
    wrong = config | {"training": config["training"] | {"epochs": [1, 2, 1]}}
    with pytest.raises(ConfigError, match="entry 1 is 1, but stage 1 began with 2"):
        run(wrong, QUIET)
    before = tensors(short / "run")
    run(config, QUIET)
    assert before.items() <= tensors(short / "run").items()
    stages = read_json(short / "run" / "run.json")["stages"]
    assert [s["config"]["training"]["epochs"] for s in stages] == [2, 2, 1]
    assert [s["config"]["training"]["learning_rate"] for s in stages] == [3e-2, 3e-2, 1e-3]
    grown = read_run(short / "run")
    assert grown.setting("training.learning_rate") == [3e-2, 3e-2, 1e-3] and grown.setting("training.batch_size") == 8
    assert "<code>training.learning_rate: 0.001</code>" in (short / "run" / "report.html").read_text()
    assert [read_json(p)["steps"] for p in sorted(short.glob("run/stages/*/stage.json"))] == [6, 6, 3]


def refused(short: Path, why: str, tasks: list[str], **changes: Any) -> None:
    files = {path: path.read_bytes() for path in (short / "run").rglob("*") if path.is_file() and path.name != ".lock"}
    with pytest.raises((RunDirectoryError, ConfigError), match=why):
        run(configuration(short, "run", tasks, **changes), QUIET)
    assert all(path.read_bytes() == content for path, content in files.items())


def test_what_is_no_growth_is_refused_with_the_difference(short):
    refused(short, r'stream\.order: \["red", "green"\] -> \["green", "red", "blue"\]', ["green", "red", "blue"])
    refused(short, r'stream\.order: \["red", "green"\] -> \["red"\]', ["red"])
    refused(short, r"seed: 0 -> 1", TASKS, seed=1)
    folder = {"path": str(short / "tasks")}
    refused(short, r"tasks: red, green -> blue, green, red\ntasks can only be appended", TASKS, stream=folder)
    rows = short / "tasks" / "red" / "train.json"
    rows.write_text(rows.read_text().replace("red", "rod", 1))
    refused(short, r"the data of task 'red': \w+ -> \w+", TASKS)


def test_killed_at_any_point_it_ends_with_the_same_numbers(folder, tmp_path):
    """Before the appended task is measured, amid its stage, and amid the backfill."""
    shutil.copytree(folder / "short", tmp_path / "broken")
    file = tmp_path / "broken.json"
    config = configuration(folder, "", TASKS) | {"output": str(tmp_path / "broken")}
    config["training"]["save_every"] = 4
    file.write_text(json.dumps(config))
    for point in (("response", 1), ("step", 5), ("response", 1, "backfill")):
        assert finish(start(file, *point)) == -signal.SIGKILL, f"{point} was never reached"
    assert finish(start(file, "backfill")) == 0
    assert results(tmp_path / "broken") == results(folder / "whole")
    record = read_json(tmp_path / "broken" / "run.json")
    assert len(record["grown"]) == 1 and [s["task"] for s in record["stages"]] == TASKS and record["finished"]


def test_a_frozen_model_is_measured_on_appended_tasks_and_joint_training_has_none(short):
    config = configuration(short, "frozen", TASKS[:2], method="frozen")
    run(config, QUIET)
    config["stream"]["order"] = TASKS
    scores = run(config, QUIET)["scores"]
    assert scores == [scores[0]] * 4 and None not in scores[0]
    run(configuration(short, "joint", TASKS[:2], method="joint"), QUIET)
    with pytest.raises(RunDirectoryError, match="'joint' learned all tasks in one stage"):
        run(configuration(short, "joint", TASKS, method="joint"), QUIET)


def test_plans_over_all_stages_are_those_of_the_tasks_that_the_run_began_with(folder):
    def steps(tasks: list[str], past: Past) -> int:
        config = configuration(folder, "adalora", tasks, tuner="adalora", method="sequential")
        return prepare(resolve(load_config(config)), past=past).tuner.options.total_step

    assert steps(TASKS, Past(planned=2)) == steps(TASKS[:2], Past()) == 12
    assert steps(TASKS, Past()) == 18
    merge = {"method": {"name": "seq_lora_merge", "weights": [0.5, 0.5]}, "tuner": "lora"}
    with pytest.raises(ConfigError, match="weights has 2 entries, but there are 3 stages"):
        prepare(resolve(load_config(configuration(folder, "merge", TASKS, **merge))), past=Past(planned=2))


def test_check_says_what_is_new_and_a_sweep_does_it(folder, capsys):
    file = folder / "short.json"
    file.write_text(json.dumps(configuration(folder, "short", TASKS)))
    assert holdfast("check", file) == 0
    shown = capsys.readouterr().out
    assert "the run goes on with appended tasks: blue" in shown
    assert [line.endswith(", done") for line in shown.splitlines() if line.startswith("stage ")] == [True, True, False]
    assert not is_done(load_config(file), folder / "short")
    assert is_done(load_config(configuration(folder, "short", TASKS[:2])), folder / "short")


def test_the_page_and_the_terminal_say_why_a_figure_is_null(folder):
    grown = read_run(folder / "grown")
    assert [line.partition(" ")[0] for line in lacking(grown)] == ["forward_transfer"]
    page = (folder / "grown" / "report.html").read_text()
    assert grown.matrix["missing"]["forward_transfer"] in page
    assert lacking(read_run(folder / "whole")) == []


@pytest.mark.slow
def test_adalora_learns_an_appended_task_at_its_final_budget(folder):
    tuner = {"name": "adalora", "init_r": 4, "target_r": 2, "lora_dropout": 0.0}
    for tasks in (TASKS[:2], TASKS):
        run(configuration(folder, "adalora", tasks, tuner=tuner, method="sequential"), QUIET)
    left, changed = [], []
    for path in sorted(folder.glob("adalora/stages/*/adapter")):
        weights = load_file(path / "adapter_model.safetensors")
        values = [w for name, w in weights.items() if "lora_E" in name]
        left.append(sum(int((w != 0).sum()) for w in values) / len(values))
        changed.append(torch.cat(values))
        assert read_json(path / "adapter_config.json")["total_step"] == 12
    assert left[1] == left[2] == 2
    assert not torch.equal(changed[1], changed[2]), "the third stage trains"
