"""The stages of a run, and their epochs and optimizer steps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from holdfast.api.method import Method
from holdfast.api.task import Stream, Task
from holdfast.config.describe import free_keys
from holdfast.config.stream import DataConfig
from holdfast.config.training import TrainingConfig
from holdfast.data.collate import pack
from holdfast.errors import ConfigError
from holdfast.training.kinds import generations

Rows = dict[str, Sequence[dict[str, Any]]]
"""Each task's tokenised train rows: a list, or of a large task what reads them where they lie."""


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


def stage_training(
    training: TrainingConfig, stages: Sequence[PlannedStage], begun: Mapping[int, TrainingConfig]
) -> list[TrainingConfig]:
    """The settings of each stage, with the epochs of that stage alone.

    Args:
        training: of the stages that have not begun; what changes no result is that of all.
        begun: of those that have, by number, as a run recorded them.

    Raises:
        ConfigError: a list of epochs has not one entry a stage, or says other epochs of a stage than it began with.
    """
    epochs = training.epochs
    if isinstance(epochs, list) and len(epochs) != len(stages):
        raise ConfigError(f"training.epochs: has {len(epochs)} entries, but the run has {len(stages)} stages")
    free = {key: getattr(training, key) for key in free_keys(TrainingConfig)}
    settings = []
    for t in range(1, len(stages) + 1):
        own = begun[t].model_copy(update=free) if t in begun else training
        of_stage = own.epochs[t - 1] if isinstance(own.epochs, list) else own.epochs
        if isinstance(epochs, list) and epochs[t - 1] != of_stage:
            raise ConfigError(
                f"training.epochs: entry {t} is {epochs[t - 1]:g}, but stage {t} began with {of_stage:g}; give what it "
                "had, or one number for all stages that are left"
            )
        settings.append(own.model_copy(update={"epochs": of_stage}))
    return settings


def optimizer_steps(
    training: TrainingConfig, data: DataConfig, stage: PlannedStage, rows: Rows, max_length: int
) -> int:
    """Optimizer steps of a stage.

    Args:
        training: the stage's own.
    """
    assert not isinstance(training.epochs, list)
    if training.max_steps is not None:
        return training.max_steps
    [kind] = {task.kind for task in stage.tasks}
    if kind != "sft":
        [task] = stage.tasks
        return math.ceil(training.epochs * _steps_of_kind(task, training.batch_size))
    count = sum(len(rows[task.name]) for task in stage.tasks)
    if data.packing:
        count = len(pack([row for task in stage.tasks for row in rows[task.name]], max_length))
    return math.ceil(training.epochs * math.ceil(count / training.batch_size))


def _steps_of_kind(task: Task, batch_size: int) -> int:
    """Optimizer steps of an epoch of a task of another kind than sft; of grpo, only whole steps are made.

    Raises:
        ConfigError: the prompts of grpo do not make one step, or the answers to a prompt do not divide a step's.
    """
    if task.kind != "grpo":
        return math.ceil(len(task.train) / batch_size)
    answers = generations(task.options)
    if batch_size % answers:
        raise ConfigError(
            f"task {task.name!r}: options.num_generations: {answers} answers to each prompt do not divide the "
            f"{batch_size} of a step (training.batch_size); {-(-batch_size // answers) * answers} would do"
        )
    prompts = batch_size // answers
    if len(task.train) < prompts:
        raise ConfigError(
            f"task {task.name!r}: {len(task.train)} train rows are fewer than the {prompts} prompts of a step "
            f"(training.batch_size={batch_size} answers, {answers} to each prompt); a smaller batch, "
            "or a higher options.num_generations, would do"
        )
    return len(task.train) // prompts
