"""What is measured of the model that a run holds: all of it, or what the figures need."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from holdfast.api.task import General, Task
from holdfast.config.evaluation import EvaluationConfig
from holdfast.runner.plan import PlannedStage


@dataclass(frozen=True)
class Due:
    """The tasks and the measures of general ability that one model is measured by."""

    tasks: list[Task]
    general: list[General]


def due(
    settings: EvaluationConfig,
    stage: PlannedStage,
    stages: Sequence[PlannedStage],
    tasks: Sequence[Task],
    general: Sequence[General],
) -> Due:
    """What is measured after a stage.

    With ``when: learned`` these are the tasks of the stages so far, and those of the next one; with ``when: last``
    those of this stage and of the next one. The model before training and the last stage's model are measured by all
    general abilities, and the last one by all tasks, whatever the settings say.

    Args:
        settings: ``when`` and ``general_when`` say what is left out.
        stage: which has ended; :data:`~holdfast.runner.plan.START` before training.
        stages: of the run, without the start.
        tasks, general: all that the run has.
    """
    last = stage.index == len(stages)
    if last or settings.when == "all":
        chosen = list(tasks)
    else:
        first = 1 if settings.when == "learned" else stage.index
        wanted = {task.name for one in stages if first <= one.index <= stage.index + 1 for task in one.tasks}
        chosen = [task for task in tasks if task.name in wanted]
    always = last or stage.index == 0 or settings.general_when == "all"
    return Due(chosen, list(general) if always else [])
