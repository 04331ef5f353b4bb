"""GEM: a step that raises the loss on no past task, to first order."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field

from holdfast.api.stage import Step
from holdfast.engines.shards import Shards
from holdfast.methods.parts.gradient_memory import GradientMemory
from holdfast.methods.parts.projection import gem_dual


class GEM(GradientMemory):
    """Gradient episodic memory (Lopez-Paz and Ranzato, 2017, arXiv 1706.08840, equations 8 to 11).

    With g the gradient of the task and g_1 ... g_{t-1}, the rows of G, those of memory rows of each past task, and
    <g, g_k> < 0 for some k:

        g <- g + G^T v,  v = argmin_v 1/2 v^T G G^T v + g^T G^T v  subject to  v >= margin

    For margin 0 this is the nearest g~ with <g~, g_k> >= 0 for all k. For any other margin these inequalities still
    hold, and each g_k is added at least margin times.
    """

    name = "gem"
    turn = 1
    not_with: ClassVar = {
        "a_gem": "A-GEM's projection would undo the constraints that GEM has satisfied",
        "ogd": "OGD's projection would undo the constraints that GEM has satisfied, and GEM would add back gradients "
        "that OGD takes away",
        "osf": "osf's projection would undo the constraints that GEM has satisfied",
    }

    class Options(GradientMemory.Options):
        margin: float = Field(
            0.5, ge=0, description="the paper's memory strength gamma, the least v; 0: the nearest gradient, no more"
        )

    options: Options

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
            groups.append(step.random(f"{self.name}/{task}").sample(rows, self.reference_size(step, len(rows))))
        return step.stage.gradients(groups)
