"""A-GEM: a step that does not raise the average loss on past samples, to first order."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field

from holdfast.api.stage import Step
from holdfast.engines.shards import Shards
from holdfast.methods.parts.gradient_memory import GradientMemory


class AveragedGEM(GradientMemory):
    """Averaged gradient episodic memory (Chaudhry et al., 2019, arXiv 1812.00420, equation 11).

    With g the gradient of the task and r that of a random batch of the memory, over all past tasks together:

        g <- g - (<g, r> / <r, r>) r  if <g, r> < 0,  else g stays as it is.
    """

    name = "a_gem"
    turn = 1
    not_with: ClassVar = {
        "gem": "A-GEM's projection would undo the constraints that GEM has satisfied",
        "ogd": "OGD's projection would undo the constraint that A-GEM has satisfied, and A-GEM would add back a "
        "gradient that OGD takes away",
        "osf": "osf's projection would undo the constraint that A-GEM has satisfied",
    }

    class Options(GradientMemory.Options):
        policy: Literal["quota", "reservoir"] = Field(
            "quota", description="quota: as many rows of each past task; reservoir: each past row equally likely"
        )

    options: Options

    @property
    def policy(self) -> Literal["quota", "reservoir"]:
        return self.options.policy

    def after_backward(self, step: Step, gradients: Shards) -> dict[str, float]:
        if not len(self.memory):
            return {}
        count = self.reference_size(step, len(self.memory))
        reference = step.stage.gradient(self.memory.sample(count, step.random(self.name)))
        size = float(reference.l1().sum())
        if size < torch.finfo(torch.float32).tiny:  # 0 but for rounding
            return {"a_gem/projected": 0.0}
        reference.scale_(1 / size)  # the square of a small gradient would be 0 in float32
        product = gradients.dot(reference)
        if product >= 0:
            return {"a_gem/projected": 0.0}
        gradients.add_(reference, -product / reference.dot(reference))
        return {"a_gem/projected": 1.0}
