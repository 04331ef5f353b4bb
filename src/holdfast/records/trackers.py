"""Experiment trackers: W&B, MLflow, TensorBoard and Trackio, each of which keeps one tracker run a holdfast run.

Each class takes the id of a tracker run to go on with, or begins a new one, whose id is then ``run``. Their libraries
are imported when a class is made.
"""

from __future__ import annotations

import importlib.util
import os
import re
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from holdfast.config.describe import flat
from holdfast.errors import ConfigError

Axis = Literal["train", "stage"]
"""What a point's step counts: optimizer steps over all stages, or stages."""

PROJECT = "holdfast"
BY_STAGE = ("score", "figure", "learned", "forgetting", "general", "gate")
"""What the names of points on the axis of stages begin with."""


@dataclass(frozen=True)
class About:
    """What a tracker is told of a run.

    Attributes:
        root: the run's directory.
        name: for people.
        config: as run.json has it.
        options: fields of transformers' TrainingArguments that a tracker reads, such as ``project``.
        former: tracker runs that hold what the run was before it was made again, and get no more points.
    """

    root: Path
    name: str
    config: Mapping[str, Any]
    options: Mapping[str, Any]
    former: Sequence[str] = ()

    def given(self, variable: str) -> str | None:
        """The tracker run that an environment variable names, unless it is a former one."""
        run = os.environ.get(variable)
        return None if run in self.former else run

    def free(self, folder: Path) -> str:
        """The folder, or the first of FOLDER-2, FOLDER-3 and so on that is no former tracker run."""
        names = (str(folder), *(f"{folder}-{number}" for number in range(2, len(self.former) + 2)))
        return next(name for name in names if name not in self.former)


class Tracker(Protocol):
    """A tracker run that is open."""

    run: str

    def __init__(self, about: About, run: str | None): ...

    def log(self, axis: Axis, step: int, values: Mapping[str, float]) -> None:
        """Add a point to each of the named curves."""

    def artifact(self, path: Path) -> None:
        """Keep a file, where the tracker keeps files."""

    def close(self, done: bool) -> None:
        """End the tracker run; ``done``: the run was not stopped."""


class WandB:
    """A run of Weights & Biases; WANDB_PROJECT, WANDB_RUN_ID, WANDB_MODE and its other variables count.

    A run that the user's own program has begun is used, and left open.
    """

    def __init__(self, about: About, run: str | None):
        import wandb

        self._wandb = wandb
        self._mine = wandb.run is None
        self._run = wandb.run or wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=about.name,
            id=run or about.given("WANDB_RUN_ID") or secrets.token_hex(4),
            resume="allow",
        )
        self.run = str(self._run.id)
        self._run.config.update(dict(about.config), allow_val_change=True)
        for step, names in (("step", ("train", "during")), ("stage", BY_STAGE)):
            self._run.define_metric(step)
            for name in names:
                self._run.define_metric(f"{name}/*", step_metric=step)

    def log(self, axis: Axis, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step" if axis == "train" else "stage": step, **values})

    def artifact(self, path: Path) -> None:
        artifact = self._wandb.Artifact(f"report-{self.run}", type="report")
        artifact.add_file(str(path))
        self._run.log_artifact(artifact)

    def close(self, done: bool) -> None:
        if self._mine:
            self._run.finish(exit_code=0 if done else 1)


class MLflow:
    """A run of MLflow; MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME, MLFLOW_EXPERIMENT_ID and MLFLOW_RUN_ID count."""

    def __init__(self, about: About, run: str | None):
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        self._client, self._metric = MlflowClient(), Metric
        run = run or about.given("MLFLOW_RUN_ID")
        if run:
            self._client.update_run(run, status="RUNNING")
            self.run = run
            return
        self.run = self._client.create_run(self._experiment(), run_name=about.name).info.run_id
        params = [Param(self._name(key), str(value)[:500]) for key, value in flat(dict(about.config)).items()]
        for first in range(0, len(params), 100):  # the most that it takes at once
            self._client.log_batch(self.run, params=params[first : first + 100])

    def log(self, axis: Axis, step: int, values: Mapping[str, float]) -> None:
        now = int(1000 * time.time())
        self._client.log_batch(self.run, [self._metric(self._name(key), v, now, step) for key, v in values.items()])

    def artifact(self, path: Path) -> None:
        self._client.log_artifact(self.run, str(path))

    def close(self, done: bool) -> None:
        self._client.set_terminated(self.run, "FINISHED" if done else "KILLED")

    def _experiment(self) -> str:
        if given := os.environ.get("MLFLOW_EXPERIMENT_ID"):
            return given
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        found = self._client.get_experiment_by_name(name)
        return str(found.experiment_id if found else self._client.create_experiment(name))

    @staticmethod
    def _name(key: str) -> str:
        """A key of the characters that MLflow takes, which is no path out of its place."""
        parts = (re.sub(r"[^0-9A-Za-z_\-. :]", "_", part) for part in key.split("/"))
        return "/".join(part if part.strip(".") else "_" for part in parts)


class TensorBoard:
    """Event files in ``RUN/tensorboard``, or in a folder of the run's name below TENSORBOARD_LOGGING_DIR."""

    def __init__(self, about: About, run: str | None):
        from torch.utils.tensorboard import SummaryWriter

        given = os.environ.get("TENSORBOARD_LOGGING_DIR")
        self.run = run or (about.free(Path(given).expanduser().absolute() / about.name) if given else "tensorboard")
        self._writer = SummaryWriter(str(about.root / self.run))
        if run is None:
            lines = [f"| {key} | {value} |" for key, value in flat(dict(about.config)).items()]
            self._writer.add_text("config", "\n".join(["| key | value |", "|---|---|", *lines]))

    def log(self, axis: Axis, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def artifact(self, path: Path) -> None:
        """TensorBoard keeps no files."""

    def close(self, done: bool) -> None:
        self._writer.close()


class Trackio:
    """A run of Trackio; ``training.arguments`` gives ``project`` and ``trackio_space_id``."""

    def __init__(self, about: About, run: str | None):
        import trackio

        self.run = run or f"{about.name}-{secrets.token_hex(3)}"
        self._run = trackio.init(
            project=about.options.get("project", PROJECT),
            name=self.run,
            resume="allow",
            config=dict(about.config),
            space_id=about.options.get("trackio_space_id"),
            embed=False,
        )

    def log(self, axis: Axis, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def artifact(self, path: Path) -> None:
        if hasattr(self._run, "log_artifact"):  # older versions keep no files
            self._run.log_artifact(path, name=f"report-{self.run}", type="report")

    def close(self, done: bool) -> None:
        self._run.finish()


TRACKERS: dict[str, type[Tracker]] = {
    "wandb": WandB,
    "mlflow": MLflow,
    "tensorboard": TensorBoard,
    "trackio": Trackio,
}
"""By the names that transformers' ``report_to`` gives them."""


def chosen(report_to: Sequence[str]) -> list[str]:
    """Of the names in ``report_to`` those of trackers here; ``all`` are those that are installed.

    Raises:
        ConfigError: a tracker is not installed.
    """
    if "all" in report_to:
        return [name for name in TRACKERS if _installed(name)]
    names = [name for name in dict.fromkeys(report_to) if name in TRACKERS]
    for name in names:
        if not _installed(name):
            raise ConfigError(f"training.report_to: {name} is not installed; `pip install {name}` installs it")
    return names


def _installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None
