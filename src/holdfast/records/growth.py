"""How a run grows: tasks appended to its stream, and the settings that each of its stages was trained with."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from holdfast.config.describe import Difference, differences, flat
from holdfast.config.reading import validate
from holdfast.config.section import Section
from holdfast.config.training import TrainingConfig
from holdfast.records.shapes import read_json

BEGUN = ("stage.json", "checkpoint")
"""What the folder of a stage holds once something of its training is saved."""


@dataclass(frozen=True)
class Past:
    """What a run did before this start.

    Attributes:
        training: the settings of each stage that began, by number.
        finished: the numbers of the stages that are trained.
        planned: the number of tasks that the run began with; None: it has not begun.
    """

    training: dict[int, TrainingConfig] = field(default_factory=dict)
    finished: frozenset[int] = frozenset()
    planned: int | None = None

    @classmethod
    def of(cls, path: Path, record: Mapping[str, Any]) -> Past:
        """Read it from a run's directory and its run.json, which may be empty."""
        if not record:
            return cls()
        where = f"{path / 'run.json'}: stages: config.training"
        new, appended = not_begun(path, record), [t for growth in record.get("grown", []) for t in growth["tasks"]]
        stages = [stage for stage in recorded_stages(path, record) if stage["task"] not in new]
        return cls(
            {stage["stage"]: validate(TrainingConfig, stage["config"]["training"], where) for stage in stages},
            frozenset(t for t in range(1, len(record["tasks"]) + 1) if _has(path, t, "stage.json")),
            len([task for task in record["tasks"] if task not in appended]),
        )


def not_begun(path: Path, record: Mapping[str, Any]) -> list[str]:
    """The tasks that were appended last, as far as their stages have not begun."""
    latest = record["grown"][-1]["tasks"] if record.get("grown") else []
    numbers = {name: t for t, name in enumerate(record["tasks"], start=1)}
    return [name for name in latest if name in numbers and not any(_has(path, numbers[name], file) for file in BEGUN)]


def not_finished(path: Path, record: Mapping[str, Any]) -> list[str]:
    """The tasks whose stages are not finished."""
    return [name for t, name in enumerate(record["tasks"], start=1) if not _has(path, t, "stage.json")]


def _has(path: Path, stage: int, file: str) -> bool:
    return any(path.glob(f"stages/{stage:02d}-*/{file}"))


def recorded_stages(path: Path, record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What a run noted of each stage that began: ``stage``, ``task``, ``config`` (resolved), ``fingerprint`` of its
    data, ``versions``, ``started`` and ``finished``, which is None while it is under way.

    A run of 0.1.0 noted nothing. Of its finished stages, all but the start is known.

    Args:
        path: the run's directory.
        record: the content of its run.json.
    """
    if "stages" in record:
        return list(record["stages"])
    stages = []
    for file in sorted(path.glob("stages/[0-9]*-*/stage.json")):
        stage = read_json(file)
        tasks = [stage["task"]] if stage["task"] in record["tasks"] else list(record["tasks"])
        written = datetime.datetime.fromtimestamp(file.stat().st_mtime, datetime.UTC)
        stages.append(
            {
                "stage": stage["stage"],
                "task": stage["task"],
                "config": record["config"],
                "fingerprint": " ".join(record["tasks"][task]["fingerprint"] for task in tasks),
                "versions": record.get("versions", {}),
                "started": None,
                "finished": written.isoformat(timespec="seconds"),
            }
        )
    return sorted(stages, key=lambda stage: stage["stage"])


def stage_settings(path: Path, record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The settings of training of each stage that began, with the epochs of that stage alone, by dotted keys."""
    found = []
    for stage in recorded_stages(path, record):
        settings = flat({"training": stage["config"]["training"]})
        epochs = settings["training.epochs"]
        found.append(settings | {"training.epochs": epochs[stage["stage"] - 1] if isinstance(epochs, list) else epochs})
    return found


def unexplained(record: Mapping[str, Any], config: Section) -> list[str]:
    """The differences to the recorded configuration that no growth explains, as far as the configuration shows it.

    Tasks may be appended to ``stream.order`` and ``stream.tasks``. Whether others may, and settings under ``training``
    may differ, shows once the stream is loaded: see :meth:`.RunDirectory.appended`.
    """
    found = differences(record["config"], config)
    if "tasks" not in record:
        return [str(difference) for difference in found]
    return [str(d) for d in found if not (d.key.startswith("training.") or _may_grow(d))]


def of_training(record: Mapping[str, Any], config: Section) -> list[str]:
    """The differences to the recorded configuration under ``training``."""
    return [str(d) for d in differences(record["config"], config) if d.key.startswith("training.")]


def _may_grow(difference: Difference) -> bool:
    old, new = difference.old, difference.new
    both = isinstance(old, list) and isinstance(new, list)
    if difference.key == "stream.tasks":
        return both and starts_with(new, old)
    return difference.key == "stream.order" and (not both or starts_with(new, old))


def starts_with(tasks: Sequence[Any], first: Sequence[Any]) -> bool:
    """Whether a list begins with the entries of another."""
    return list(tasks[: len(first)]) == list(first)
