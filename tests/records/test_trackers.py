"""Trackers: what of a run reaches W&B, MLflow, TensorBoard and Trackio; one tracker run a run, no point twice."""

from __future__ import annotations

import importlib.machinery
import json
import sys
import types
from collections import Counter
from pathlib import Path
from typing import Any, ClassVar

import pytest

from holdfast import load_config, run
from holdfast.errors import ConfigError
from holdfast.records import trackers
from holdfast.records.follow import STATE
from holdfast.runner.rebuild.rebuild import rebuild
from holdfast.system.files import read_json, read_jsonl
from holdfast.system.progress import Progress
from support.tiny import tiny_config

QUIET = Progress(quiet=True)


class Fake:
    """A tracker that keeps what it gets, in this process alone; it can be out of reach, or die."""

    made: ClassVar[list[Fake]] = []
    points: ClassVar[list[tuple[str, str, int, float]]] = []
    files: ClassVar[list[str]] = []
    breaks_at: int | None = None
    broken: type[BaseException] = ConnectionError

    def __init__(self, about: trackers.About, run: str | None):
        self.run, self.given, self.about = run or "new", run, about
        Fake.made.append(self)

    def log(self, axis: str, step: int, values: dict[str, float]) -> None:
        if axis == "train" and step == Fake.breaks_at:
            raise Fake.broken("out of reach")
        Fake.points += [(axis, name, step, value) for name, value in values.items()]

    def artifact(self, path: Path) -> None:
        Fake.files.append(path.name)

    def close(self, done: bool) -> None:
        self.done = done


@pytest.fixture(autouse=True)
def fake(monkeypatch: pytest.MonkeyPatch) -> None:
    Fake.made, Fake.points, Fake.files, Fake.breaks_at, Fake.broken = [], [], [], None, ConnectionError
    monkeypatch.setitem(trackers.TRACKERS, "fake", Fake)
    monkeypatch.setattr(trackers, "_installed", lambda name: name in sys.modules or name == "fake" or _real(name))


def _real(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ValueError:
        return True


def followed(folder: Path, *names: str, **changes: Any) -> Any:
    """A run of two stages of six steps, measured every four."""
    folder.mkdir(exist_ok=True)
    (folder / "general.txt").write_text("red and green\nblue is not red\n")
    config = tiny_config(folder, method="replay", **changes)
    config["stream"]["order"] = ["red", "green"]
    config["training"] |= {"max_steps": 6, "save_every": 4, "report_to": list(names)}
    config["evaluation"] |= {"every": 4, "general": [{"name": "colours", "path": str(folder / "general.txt")}]}
    return load_config(config)


def once(points: list[Any]) -> set[Any]:
    """Points without their values, of which none may stand twice."""
    places = Counter(point[:3] for point in points)
    assert not [place for place, times in places.items() if times > 1]
    return set(places)


def test_a_tracker_gets_curves_scores_figures_and_the_verdict(tmp_path: Path) -> None:
    gate = {"max_forgetting": 1.0, "on_fail": "continue"}
    matrix = run(followed(tmp_path, "fake", gate=gate), QUIET)
    once(Fake.points)
    sent = {(name, step): value for _, name, step, value in Fake.points}
    events = read_jsonl(tmp_path / "run" / "events.jsonl")
    for event in events:
        at = 6 * (event["stage"] - 1) + event["step"]  # steps count on over the stages
        assert sent["train/loss", at] == event["loss"]
        for term, value in event["terms"].items():
            assert sent[f"train/terms/{term}", at] == value
    assert ("train/terms/replay", 7) in sent and ("train/terms/replay", 6) not in sent
    for t, row in enumerate(matrix["scores"]):
        assert [sent["score/red", t], sent["score/green", t]] == row
        assert sent["general/perplexity/colours", t] == matrix["general"]["perplexity/colours"][t]
    for figure in ("average", "learned", "forgetting", "backward_transfer", "forward_transfer"):
        assert sent[f"figure/{figure}", 2] == matrix["summary"][figure]
    assert sent["figure/average", 1] == matrix["scores"][1][0] and ("figure/forgetting", 1) not in sent
    assert [sent["learned/red", 1], sent["learned/green", 2]] == matrix["by_task"]["learned"]
    assert sent["forgetting/red", 2] == matrix["by_task"]["forgetting"][0]
    decisions = read_json(tmp_path / "run" / "run.json")["gate"]
    assert [sent["gate/passed", t] for t in (1, 2)] == [float(d["passed"]) for d in decisions]
    assert sent["gate/forgetting limit", 2] == 1.0
    assert {step for name, step in sent if name == "during/scores/red"} == {4}
    assert {step for name, step in sent if name == "during/scores/green"} == {10}
    assert Fake.files == ["report.html"] and Fake.made[0].done


def test_a_killed_run_goes_on_in_its_tracker_run_and_writes_no_point_twice(tmp_path: Path) -> None:
    run(followed(tmp_path / "whole", "fake"), QUIET)
    whole = once(Fake.points)
    Fake.points, Fake.made, Fake.breaks_at, Fake.broken = [], [], 9, SystemExit  # after the checkpoint of step 8
    config = followed(tmp_path / "killed", "fake")
    with pytest.raises(SystemExit):
        run(config, QUIET)
    assert not Fake.made[0].done
    Fake.breaks_at = None
    run(config, QUIET)
    assert [one.given for one in Fake.made] == [None, "new"]
    assert whole - once(Fake.points) == {point for point in whole if point[0] == "train" and point[2] == 9}
    Fake.made = []
    run(config, QUIET)
    assert not Fake.made, "a run that is done has nothing to tell"


def test_a_run_that_is_made_again_gets_a_tracker_run_of_its_own(tmp_path: Path) -> None:
    """Under its name: each point once, also of the stages that were kept, and none of the task that went."""
    run(followed(tmp_path, "fake"), QUIET)
    (tmp_path / "run" / "tensorboard").mkdir()
    Fake.points, Fake.made = [], []
    rebuild(tmp_path / "run", without="red", progress=QUIET)
    places = once(Fake.points)
    assert {step for axis, _, step in places if axis == "train"} == set(range(1, 7))
    assert ("stage", "score/green", 1) in places and not [name for _, name, _ in places if "red" in name]
    assert [(one.about.name, one.given, one.about.former) for one in Fake.made] == [("run", None, ["new"])]
    assert not (tmp_path / "run" / "tensorboard").exists()
    assert read_json(tmp_path / "run" / STATE)["fake"]["former"] == ["new"]
    Fake.made = []
    config = followed(tmp_path, "fake")
    config.stream.order = ["green"]
    run(config, QUIET)
    assert once(Fake.points) == places and [one.given for one in Fake.made] == ["new"], "the page alone is another"


def test_a_former_tracker_run_is_not_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the environment says."""
    about = trackers.About(tmp_path, "run", {}, {}, former=["one", str(tmp_path / "run"), str(tmp_path / "run-2")])
    for name, run_id in (("WANDB_RUN_ID", "one"), ("MLFLOW_RUN_ID", "two")):
        monkeypatch.setenv(name, run_id)
    assert about.given("WANDB_RUN_ID") is None and about.given("MLFLOW_RUN_ID") == "two"
    assert about.free(tmp_path / "run") == str(tmp_path / "run-3")


def test_what_a_tracker_missed_is_sent_later_and_the_run_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Fake.breaks_at = 3
    config = followed(tmp_path, "fake")
    run(config, QUIET)
    assert [r.message for r in caplog.records if "fake" in r.message] == [
        "fake: not reached, the run goes on without it for now: out of reach"
    ]
    assert {point[2] for point in once(Fake.points)} == {0, 1, 2}, "the model before training, and two steps"
    Fake.breaks_at = 5
    run(config, QUIET)  # in the middle of what is sent together
    assert max(point[2] for point in once(Fake.points)) == 4
    Fake.breaks_at = None
    run(config, QUIET)
    assert {point[2] for point in once(Fake.points) if point[1] == "train/loss"} == set(range(1, 13))
    assert {point[2] for point in Fake.points if point[1] == "score/red"} == {0, 1, 2}


@pytest.fixture(scope="module")
def without(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run that no tracker followed."""
    folder = tmp_path_factory.mktemp("without")
    run(followed(folder), QUIET)
    assert not (folder / "run" / STATE).exists()
    return folder


EXPECTED = {"train/loss": list(range(1, 13)), "score/red": [0, 1, 2], "figure/average": [1, 2], "learned/green": [2]}


def test_tensorboard_on_disk(without: Path) -> None:
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for _ in range(2):  # the second call has nothing to add
        run(followed(without, "tensorboard"), QUIET)
        found = EventAccumulator(str(without / "run" / "tensorboard"), size_guidance={"scalars": 0})
        found.Reload()
        for name, steps in EXPECTED.items():
            assert [event.step for event in found.Scalars(name)] == steps
        assert found.Scalars("score/red")[-1].value == read_json(without / "run" / "matrix.json")["scores"][2][0]
    assert len(list((without / "run" / "tensorboard").iterdir())) == 1


@pytest.mark.slow
def test_mlflow_on_disk(without: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow", reason="MLflow is not installed")
    pytest.importorskip("sqlalchemy", reason="MLflow keeps runs on disk with SQLAlchemy, which is not installed")
    monkeypatch.chdir(without)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{without}/mlflow.db")
    for _ in range(2):
        run(followed(without, "mlflow"), QUIET)
        client = mlflow.MlflowClient()
        experiment = client.get_experiment_by_name("holdfast")
        [found] = client.search_runs([experiment.experiment_id])
        assert found.info.status == "FINISHED" and found.info.run_name == "run"
        assert found.data.params["training.max_steps"] == "6"
        for name, steps in EXPECTED.items():
            assert [m.step for m in client.get_metric_history(found.info.run_id, name)] == steps
        assert [file.path for file in client.list_artifacts(found.info.run_id)] == ["report.html"]


def test_wandb_is_called_as_it_wants_to_be(without: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, Any]] = []

    class Config:
        def update(self, values: dict[str, Any], allow_val_change: bool) -> None:
            calls.append(("config", (values["seed"], allow_val_change)))

    class Run:
        id = "abc"
        config = Config()

        def define_metric(self, name: str, step_metric: str | None = None) -> None:
            calls.append(("metric", (name, step_metric)))

        def log(self, values: dict[str, float]) -> None:
            calls.append(("log", values))

        def log_artifact(self, artifact: Any) -> None:
            calls.append(("artifact", artifact.files))

        def finish(self, exit_code: int) -> None:
            calls.append(("finish", exit_code))

    class Artifact:
        def __init__(self, name: str, type: str):
            self.files = [name, type]

        def add_file(self, path: str) -> None:
            self.files.append(Path(path).name)

    wandb: Any = types.ModuleType("wandb")
    wandb.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    wandb.run, wandb.Artifact = None, Artifact
    wandb.init = lambda **given: calls.append(("init", given)) or Run()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    state = without / "run" / STATE
    for _ in range(2):
        run(followed(without, "wandb"), QUIET)
    [begun] = [given for name, given in calls if name == "init"]
    assert len(begun.pop("id")) == 8 and begun == {"project": "holdfast", "name": "run", "resume": "allow"}
    metrics = dict(given for name, given in calls if name == "metric")
    assert metrics["train/*"] == "step" and metrics["score/*"] == "stage"
    logged = [values for name, values in calls if name == "log"]
    assert [values["step"] for values in logged if "train/loss" in values] == list(range(1, 13))
    assert [values["stage"] for values in logged if "score/red" in values] == [0, 1, 2]
    assert {name for values in logged for name in values if name not in ("step", "stage")} <= {
        name for values in logged for name in values if f"{name.partition('/')[0]}/*" in metrics
    }
    assert calls[-2:] == [("artifact", ["report-abc", "report", "report.html"]), ("finish", 0)]
    assert read_json(state)["wandb"]["run"] == "abc"
    state.write_text(json.dumps({"wandb": {"run": "abc"}}))  # as if all of it was still to be sent
    calls.clear()
    run(followed(without, "wandb"), QUIET)
    assert next(given for name, given in calls if name == "init")["id"] == "abc"


def test_names_of_trackers_are_checked_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"training\.report_to: there is no tracker 'wandbb'; did you mean 'wandb'\?"):
        run(followed(tmp_path, "wandbb"), QUIET)
    with pytest.raises(ConfigError, match=r"training\.report_to: nowhere is not installed"):
        trackers.TRACKERS["nowhere"] = Fake
        try:
            run(followed(tmp_path, "nowhere"), QUIET)
        finally:
            del trackers.TRACKERS["nowhere"]
    assert not (tmp_path / "run" / "run.json").exists()
    config = tiny_config(tmp_path)
    config["training"]["arguments"] = {"report_to": "tensorboard"}
    assert load_config(config).training.report_to == ["tensorboard"]
    assert load_config(config, ["training.arguments.report_to=none"]).training.report_to == []
    config["training"]["report_to"] = ["mlflow"]
    with pytest.raises(ConfigError, match="report_to is given twice"):
        load_config(config)
