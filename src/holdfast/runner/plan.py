"""The stages of a run, and their epochs and optimizer steps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from holdfast.api.method import Method
from holdfast.api.task import Stream, Task
from holdfast.config.run import RunConfig
from holdfast.config.training import TrainingConfig
from holdfast.data.collate import pack

Rows = dict[str, list[dict[str, Any]]]
"""Each task's tokenised train rows."""


@dataclass(frozen=True)
class PlannedStage:
    """A stage of a run.

    Attributes:
        index: from 1; 0 is before training.
        row: the row of the score matrix that is measured after it.
    """

    index: int
    name: str
    tasks: tuple[Task, ...]
    row: int


START = PlannedStage(0, "start", (), 0)
"""Before training."""


def plan(chosen: list[Method], stream: Stream) -> list[PlannedStage]:
    """The stages of a run: one for each task, one for all tasks, or none."""
    schedule = chosen[0].schedule
    if schedule == "none":
        return []
    if schedule == "joint":
        return [PlannedStage(1, "joint", tuple(stream.tasks), len(stream.tasks))]
    return [PlannedStage(t, task.name, (task,), t) for t, task in enumerate(stream.tasks, start=1)]


def stage_epochs(training: TrainingConfig, stage: PlannedStage) -> float:
    """Passes of a stage over its train rows."""
    return training.epochs[stage.index - 1] if isinstance(training.epochs, list) else training.epochs


def optimizer_steps(config: RunConfig, stage: PlannedStage, rows: Rows, max_length: int) -> int:
    """Optimizer steps of a stage."""
    training = config.training
    if training.max_steps is not None:
        return training.max_steps
    sequences = [row for task in stage.tasks for row in rows[task.name]]
    if config.data.packing:
        sequences = pack(sequences, max_length)
    return math.ceil(stage_epochs(training, stage) * math.ceil(len(sequences) / training.batch_size))
