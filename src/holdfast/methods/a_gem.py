"""A-GEM: never step in a direction that raises the loss on past samples, to first order."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import nn

from holdfast.api.method import Method, State
from holdfast.api.stage import Stage, Step
from holdfast.config.section import Section
from holdfast.engines.shards import Shards
from holdfast.rehearsal.memory import Memory


class AveragedGEM(Method):
    """Averaged gradient episodic memory (Chaudhry et al., 2019, arXiv 1812.00420, equation 11).

    With g the gradient of the task and r that of a random batch of the memory, over all past tasks together:

        g <- g - (<g, r> / <r, r>) r  if <g, r> < 0,  else g stays as it is.
    """

    name = "a_gem"
    not_with: ClassVar[dict[str, str]] = {
        "gem": "A-GEM's projection would undo the constraints that GEM has satisfied",
        "ogd": "OGD's projection would undo the constraint that A-GEM has satisfied, and A-GEM would add back a "
        "gradient that OGD takes away",
        "osf": "osf's projection would undo the constraint that A-GEM has satisfied",
    }

    class Options(Section):
        capacity: int = Field(
            1000, ge=0, description="rows that the memory holds, over all past tasks; 0 turns the method off"
        )
        policy: Literal["quota", "reservoir"] = Field(
            "quota", description="quota: as many rows of each past task; reservoir: each past row equally likely"
        )
        batch_size: int | None = Field(
            None, ge=1, description="memory rows in a reference gradient; where absent, as many as the step's task rows"
        )

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.memory = Memory(self.options.capacity, self.options.policy)

    def after_backward(self, step: Step, gradients: Shards) -> dict[str, float]:
        if not len(self.memory):
            return {}
        count = min(self.options.batch_size or step.rows, len(self.memory))
        reference = step.stage.gradient(self.memory.sample(count, step.random(self.name)))
        product = gradients.dot(reference)
        if product >= 0:
            return {"a_gem/projected": 0.0}
        gradients.add_(reference, -product / reference.dot(reference))
        return {"a_gem/projected": 1.0}

    def after_stage(self, stage: Stage) -> None:
        self.memory.add(stage.index, stage.rows, stage.random(self.name))

    def state(self) -> State:
        return self.memory.state()

    def load_state(self, state: State, model: nn.Module) -> None:
        self.memory.load_state(state)
