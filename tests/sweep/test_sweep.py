"""Sweeps: the runs of a grid, checked first and done once, whatever becomes of others; and search on dev splits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from filelock import FileLock

from holdfast.config.run import load_config
from holdfast.errors import ConfigError, DataError, GateFailed
from holdfast.records.read import read_runs
from holdfast.report.compare import differences
from holdfast.runner.run import run
from holdfast.sweep.plan import SearchConfig, check, expand, load_sweep
from holdfast.sweep.search import best
from holdfast.sweep.work import InUseError, do_run, work_off
from holdfast.system.files import read_json
from holdfast.system.pool import JobOutcome, Pool, WorkerDiedError
from holdfast.system.progress import Progress
from support.command import holdfast
from support.jobs import job
from support.sweeps import tiny_sweep
from support.tiny import tiny_config

QUIET = Progress(quiet=True)


def write(folder: Path, values: dict[str, Any]) -> Path:
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    return path


def sweep(capsys: Any, *arguments: object) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of ``holdfast sweep``."""
    code = holdfast("sweep", *arguments)
    output = capsys.readouterr()
    return code, output.out, output.err


def scores(folder: Path) -> dict[str, Any]:
    return {path.parent.name: read_json(path)["scores"] for path in sorted(folder.glob("*/matrix.json"))}


def test_names_say_the_values_and_do_not_depend_on_other_runs(tmp_path):
    values = tiny_sweep(tmp_path)
    names = [run.name for run in expand(load_sweep(values))]
    assert len(names) == 12
    assert names[0] == "method=sequential,learning_rate=0.01,seed=0"
    assert names[-1] == "method=joint,learning_rate=0.003,seed=1"
    assert "method=ewc-strength-10,learning_rate=0.01,seed=1" in names
    values["grid"]["seed"] = [1, 7]
    assert set(names) & {run.name for run in expand(load_sweep(values))} == {n for n in names if n.endswith("seed=1")}


def test_a_grid_changes_any_key_and_several_grids_are_all_run(tmp_path):
    grids = [
        {"method": ["ewc"], "method.strength": [1.0, 5.0], "stream.order": [["red", "blue"], ["blue", "red"]]},
        {"size": {"small": {"training.batch_size": 2}, "large": {"training.batch_size": 8, "training.epochs": 2}}},
    ]
    runs = expand(load_sweep(tiny_sweep(tmp_path, grid=grids)))
    assert [run.name for run in runs[:2]] == [
        "method=ewc,strength=1,order=red+blue",
        "method=ewc,strength=1,order=blue+red",
    ]
    assert [run.name for run in runs[4:]] == ["size=small", "size=large"]
    assert [run.config.method[0].options.get("strength") for run in runs] == [1.0, 1.0, 5.0, 5.0, None, None]
    assert runs[5].config.training.epochs == 2 and runs[4].config.training.epochs == 1
    assert expand(load_sweep(tiny_sweep(tmp_path, grid={})))[0].name == "run"


def test_a_base_gives_what_a_file_does_not_say(tmp_path):
    def names(below: Any, **own: Any) -> list[str]:
        (tmp_path / "below.yaml").write_text(yaml.safe_dump(tiny_sweep(tmp_path, grid=below)))
        runs = expand(load_sweep(write(tmp_path, {"base": "below.yaml", "run": {"training.epochs": 7}} | own)))
        assert {run.config.training.epochs for run in runs} == {7}
        return [run.name for run in runs]

    few, seeds = {"method": ["ewc"]}, {"seed": [0, 1]}
    assert names(few, grid=seeds) == ["method=ewc,seed=0", "method=ewc,seed=1"]
    assert names([few, seeds]) == ["method=ewc", "seed=0", "seed=1"]
    assert names([few], grid=seeds) == names(few, grid=[seeds]) == ["seed=0", "seed=1"]
    with pytest.raises(ConfigError, match=r"sweep\.yaml: base: run of a sweep with a base, and .*, must be mappings"):
        names(few, run=["training.epochs=7"])


def test_a_run_that_is_a_file_can_be_changed(tmp_path):
    values = tiny_sweep(tmp_path, grid={"seed": [3]})
    (tmp_path / "first.yaml").write_text(yaml.safe_dump(values["run"] | {"output": "runs/first"}))
    path = write(tmp_path, values | {"run": str(tmp_path / "first.yaml")})
    [run] = expand(load_sweep(path, ["run.training.max_steps=7"]))
    assert (run.config.training.max_steps, run.config.training.batch_size, run.config.seed) == (7, 4, 3)


def test_wrong_sweeps_are_told(tmp_path):
    values = tiny_sweep(tmp_path)
    with pytest.raises(ConfigError, match=r"gird: unknown key; did you mean 'grid'"):
        load_sweep(values | {"gird": {}})
    with pytest.raises(ConfigError, match=r"run\.output: the sweep gives each run a folder"):
        load_sweep(values | {"run": values["run"] | {"output": "here"}})
    with pytest.raises(ConfigError, match=r"learning_rat=1: .*unknown key; did you mean 'learning_rate'"):
        expand(load_sweep(values | {"grid": {"training.learning_rat": [1]}}))
    with pytest.raises(ConfigError, match=r"2 runs are called 'model=model'"):
        expand(load_sweep(values | {"grid": {"model": ["a/model", "b/model"]}}))
    with pytest.raises(ConfigError, match=r"method=replai: .*did you mean 'replay'"):
        check(expand(load_sweep(values | {"grid": {"method": ["sequential", "replai"]}})))


def test_nothing_starts_while_any_run_is_wrong(tmp_path, capsys):
    values = tiny_sweep(tmp_path)
    values["grid"]["stream.order"] = [["red"], ["rot"]]
    code, _, said = sweep(capsys, write(tmp_path, values))
    assert code == 2 and "holds no task 'rot'" in said
    assert not (tmp_path / "sweep").exists()


def test_a_run_with_another_configuration_is_not_overwritten(tmp_path):
    runs = expand(load_sweep(tiny_sweep(tmp_path, grid={"seed": [0]})))
    run(runs[0].config, QUIET)
    assert runs[0].state == "done"
    changed = tiny_sweep(tmp_path, grid={"seed": [0]})
    changed["run"]["training"]["max_steps"] = 3
    with pytest.raises(Exception, match=r"seed=0: .*holds a run with another configuration:\n  training.max_steps: 2"):
        check(expand(load_sweep(changed)))
    changed["grid"]["seed"] = [1, 0]  # the run that is there is not the first of its kind
    with pytest.raises(Exception, match=r"seed=0: .*holds a run with another configuration"):
        check(expand(load_sweep(changed)))


SMALL = {"method": ["sequential"], "seed": [0, 1, 2]}


@pytest.mark.parametrize(
    ("grid", "count", "row"),
    [
        ({"grid": SMALL}, 3, "| sequential | 3 |"),
        pytest.param({}, 12, "| sequential, learning_rate 0.01 | 2 |", marks=pytest.mark.slow),
    ],
)
def test_runs_are_done_once_and_compared(grid, count, row, tmp_path, capsys):
    path = write(tmp_path, tiny_sweep(tmp_path, **grid))
    code, said, _ = sweep(capsys, path, "--dry-run")
    assert code == 0 and f"{count} runs, 0 done" in said and not (tmp_path / "sweep").exists()
    assert holdfast("check", path) == 0
    assert f"{count} runs, 0 done" in capsys.readouterr().out
    first = expand(load_sweep(path))[0]
    run(first.config, QUIET)
    before = (first.path / "run.json").stat().st_mtime_ns

    code, said, errors = sweep(capsys, path, "--processes", "2")
    assert code == 0, errors
    states = read_json(tmp_path / "sweep" / "sweep.json")
    assert [row["state"] for row in states] == ["skipped"] + ["done"] * (count - 1)
    assert (first.path / "run.json").stat().st_mtime_ns == before
    assert (tmp_path / "sweep" / "report.html").exists()
    assert row in (tmp_path / "sweep" / "table.md").read_text(encoding="utf-8")
    assert "average" in said

    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "sweep").glob("*/run.json")}
    code, _, said = sweep(capsys, path)
    assert code == 0 and f"{count} of {count} runs are done already" in said
    assert times == {path: path.stat().st_mtime_ns for path in (tmp_path / "sweep").glob("*/run.json")}

    alone = expand(load_sweep(path))[-1]
    elsewhere = load_config(alone.config.model_dump() | {"output": str(tmp_path / "alone")})
    assert run(elsewhere, QUIET)["scores"] == scores(tmp_path / "sweep")[alone.name]


@pytest.mark.slow
def test_a_run_that_fails_stops_no_other_and_is_told_of(tmp_path, capsys):
    values = tiny_sweep(tmp_path, grid={"training.learning_rate": [1e-2, 1e30], "seed": [0]})
    values["run"]["training"] |= {"max_steps": 6, "max_grad_norm": 0.0}
    code, said, _ = sweep(capsys, write(tmp_path, values), "--processes", "1")
    rows = read_json(tmp_path / "sweep" / "sweep.json")
    assert [row["state"] for row in rows] == ["done", "failed"]
    assert code == rows[1]["exit_code"] == 2
    assert "failed" in said and "not finite" in " ".join(said.split()).replace("NaN", "not finite")
    assert (tmp_path / "sweep" / "report.html").exists()


@pytest.mark.slow
def test_a_run_that_another_sweep_is_at_is_left_to_it(tmp_path, monkeypatch):
    monkeypatch.setattr("holdfast.sweep.work.PATIENCE", 0.05)
    runs = expand(load_sweep(tiny_sweep(tmp_path, grid={"seed": [0, 1]})))
    runs[0].path.parent.mkdir()
    done: list[str] = []

    class Here:
        """Does runs at once, in this process."""

        outcome = None

        @property
        def free(self):
            return int(self.outcome is None)

        working = 0

        def submit(self, key, config):
            try:
                do_run(1, config)
                done.append(key.name)
                self.outcome = (key, JobOutcome())
            except InUseError as error:
                self.outcome = (key, JobOutcome(error=error))
                if done:
                    lock.release()  # the other sweep has done it

        def wait(self, seconds=None):
            outcome, self.outcome = self.outcome, None
            return [outcome]

    lock = FileLock(runs[0].path.parent / f".{runs[0].name}.lock")
    lock.acquire()
    assert [end.state for end in work_off(runs, Here(), QUIET)] == ["done", "done"]
    assert done == ["seed=1", "seed=0"]


def test_a_pool_outlives_a_worker_that_is_killed():
    outcomes = {}
    with Pool(job, [{}]) as pool:
        for key in ("first", "die", "raise", "last"):
            pool.submit(key, key)
            assert pool.free == 0
            outcomes |= dict(pool.wait())
    assert outcomes["first"].result() != outcomes["last"].result()
    with pytest.raises(WorkerDiedError, match="was killed by SIGKILL"):
        outcomes["die"].result()
    with pytest.raises(ConfigError, match="a key is wrong"):
        outcomes["raise"].result()


def with_dev(folder: Path) -> None:
    """Gives every tiny task a dev split: the last train rows of another shuffle, answered wrongly."""
    for task in (folder / "tasks").iterdir():
        rows = json.loads((task / "test.json").read_text(encoding="utf-8"))
        (task / "dev.json").write_text(json.dumps([row | {"answer": "z"} for row in rows[:5]]), encoding="utf-8")


def test_a_run_is_measured_on_dev_where_that_is_asked_for(tmp_path):
    values = tiny_config(tmp_path, method="frozen")
    values["evaluation"]["split"] = "dev"
    with pytest.raises(DataError, match="'red': has no eval split"):
        run(values, QUIET)
    shutil.rmtree(tmp_path / "run", ignore_errors=True)
    with_dev(tmp_path)
    run(values, QUIET)
    answers = (tmp_path / "run" / "stages" / "00-start" / "responses" / "red.jsonl").read_text(encoding="utf-8")
    assert [json.loads(line)["answer"] for line in answers.splitlines()] == ["z"] * 5

    test = tiny_config(tmp_path, method="frozen", output=str(tmp_path / "test"))
    run(test, QUIET)
    runs = read_runs([tmp_path / "run", tmp_path / "test"])
    assert any("evaluation.split" in line for line in differences(runs))
    del runs[1].info["config"]["evaluation"]["split"]  # as a run that is older than the key
    assert any("evaluation.split" in line for line in differences(runs))


def test_the_best_trial_keeps_to_the_limit():
    search = SearchConfig.model_validate({"over": {"k": {"low": 1, "high": 2}}, "max_forgetting": 0.1})
    trials = [
        {"values": {"k": i}, "average": average, "forgetting": forgetting, "lower": False}
        for i, (average, forgetting) in enumerate([(0.9, 0.3), (0.5, 0.1), (0.6, 0.05), (None, None), (0.6, 0.0)])
    ]
    assert best(trials, search, "x") == {"k": 2}
    assert best([trial | {"lower": True} for trial in trials], search, "x") == {"k": 1}
    with pytest.raises(GateFailed, match=r"x: no trial kept forgetting at most 0\.1; the least was 0\.300"):
        best(trials[:1], search, "x")


@pytest.mark.slow
def test_a_search_tries_on_dev_and_runs_the_best_on_test(tmp_path, capsys):
    search = {"over": {"method.strength": {"low": 1, "high": 1e4}}, "max_forgetting": 1.0, "trials": 2}
    values = tiny_sweep(tmp_path, grid={"method": ["ewc"], "seed": [3, 4]}, search=search)
    values["run"]["stream"]["order"] = ["red", "blue"]
    values["run"]["training"]["max_steps"] = 4
    values["run"]["data"] = {"test_rows": 2}
    with_dev(tmp_path)
    code, _, said = sweep(capsys, write(tmp_path, values), "--processes", "1")
    assert code == 0, said
    [found] = read_json(tmp_path / "sweep" / "search.json")
    strength = found["best"]["method.strength"]
    assert len({trial["values"]["method.strength"] for trial in found["trials"]}) == 2
    runs = [read_json(path) for path in (tmp_path / "sweep").glob("method=*/run.json")]
    assert sorted(run["seed"] for run in runs) == [3, 4]
    assert {run["config"]["method"][0]["strength"] for run in runs} == {strength}
    assert {run["config"]["evaluation"]["split"] for run in runs} == {"test"}
    trials = [read_json(path) for path in (tmp_path / "sweep" / "search").glob("*/*/run.json")]
    assert len(trials) == 2 and {run["config"]["evaluation"]["split"] for run in trials} == {"dev"}

    shutil.rmtree(tmp_path / "sweep" / "search" / found["cell"] / found["trials"][1]["run"])
    (tmp_path / "sweep" / "search.json").unlink()
    sweep(capsys, tmp_path / "sweep.yaml", "--processes", "1")
    assert read_json(tmp_path / "sweep" / "search.json") == [found]
