"""GEM: never step in a direction that raises the loss on any past task, to first order."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import nn

from holdfast.api.method import Method, State
from holdfast.api.stage import Stage, Step
from holdfast.config.section import Section
from holdfast.engines.shards import Shards
from holdfast.methods.parts.projection import gem_dual
from holdfast.rehearsal.memory import Memory


class GEM(Method):
    """Gradient episodic memory (Lopez-Paz and Ranzato, 2017, arXiv 1706.08840, equations 8 to 11).

    With g the gradient of the task and g_1 ... g_{t-1}, the rows of G, those of memory rows of each past task, and
    <g, g_k> < 0 for some k:

        g <- g + G^T v,  v = argmin_v 1/2 v^T G G^T v + g^T G^T v  subject to  v >= margin

    For margin 0 that is the nearest g~ with <g~, g_k> >= 0 for all k; for any other these still hold, and each g_k is
    added at least margin times.
    """

    name = "gem"
    not_with: ClassVar[dict[str, str]] = {
        "a_gem": "A-GEM's projection would undo the constraints that GEM has satisfied",
        "ogd": "OGD's projection would undo the constraints that GEM has satisfied, and GEM would add back gradients "
        "that OGD takes away",
        "osf": "osf's projection would undo the constraints that GEM has satisfied",
    }

    class Options(Section):
        capacity: int = Field(
            1000, ge=0, description="rows that the memory holds, as many of each past task; 0 turns the method off"
        )
        margin: float = Field(
            0.5, ge=0, description="the paper's memory strength gamma, the least v; 0: the nearest gradient, no more"
        )
        batch_size: int | None = Field(
            None,
            ge=1,
            description="memory rows of each past task in its gradient; where absent, as many as the step's task rows",
        )

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.memory = Memory(self.options.capacity, "quota")

    def after_backward(self, step: Step, gradients: Shards) -> dict[str, float]:
        if not len(self.memory):
            return {}
        vectors = self.past_gradients(step).joined(Shards.stack([gradients]))
        gram = vectors.gram()
        violated = int((gram[-1, :-1] < 0).sum())
        if violated:
            v = gem_dual(gram.numpy(), self.options.margin)
            gradients.add_combined_(vectors, torch.tensor([*v, 0.0]))
        return {"gem/violated": float(violated)}

    def past_gradients(self, step: Step) -> Shards:
        """A stack of the loss gradient of each past task on rows of the memory, in the order of the tasks."""
        groups = []
        for task in sorted(set(self.memory.tasks)):
            rows = [row for row, of in zip(self.memory.rows, self.memory.tasks, strict=True) if of == task]
            count = min(self.options.batch_size or step.rows, len(rows))
            groups.append(step.random(f"{self.name}/{task}").sample(rows, count))
        return step.stage.gradients(groups)

    def after_stage(self, stage: Stage) -> None:
        self.memory.add(stage.index, stage.rows, stage.random(self.name))

    def state(self) -> State:
        return self.memory.state()

    def load_state(self, state: State, model: nn.Module) -> None:
        self.memory.load_state(state)
