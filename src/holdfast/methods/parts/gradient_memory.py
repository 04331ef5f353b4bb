"""What GEM and A-GEM have in common: a memory of past rows, whose loss gradients constrain the task's gradient."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field
from torch import nn

from holdfast.api.method import Method, State
from holdfast.api.stage import Stage, Step
from holdfast.config.section import Section
from holdfast.rehearsal.memory import Memory


class GradientMemory(Method):
    """Rows of each task go into a memory at the end of its stage; a subclass constrains the gradient by theirs."""

    class Options(Section):
        capacity: int = Field(
            1000, ge=0, description="rows that the memory holds, over all past tasks; 0 turns the method off"
        )
        batch_size: int | None = Field(
            None, ge=1, description="memory rows in a reference gradient; where absent, as many as the step's task rows"
        )

    options: Options

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.memory = Memory(self.options.capacity, self.policy)

    @property
    def policy(self) -> Literal["quota", "reservoir"]:
        """The memory's policy."""
        return "quota"

    @property
    def needs_rows(self) -> bool:
        return self.options.capacity > 0

    def reference_size(self, step: Step, stored: int) -> int:
        """Rows in a reference gradient, where so many are stored."""
        return min(self.options.batch_size or step.rows, stored)

    def after_stage(self, stage: Stage) -> None:
        self.memory.add(stage.index, stage.rows, stage.random(self.name))

    def state(self) -> State:
        return self.memory.state()

    def load_state(self, state: State, model: nn.Module) -> None:
        self.memory.load_state(state, model)
