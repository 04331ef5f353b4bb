"""A penalty of LoRA's factors, whose gradient is added once an optimizer step, to the accumulated one."""

from __future__ import annotations

from torch import Tensor, nn

from holdfast.api.method import Method
from holdfast.api.stage import Stage, Step
from holdfast.config.section import Section
from holdfast.engines.shards import Shards


class FactorPenalty(Method):
    """L = L_task + strength * P(A, B), of the trained factors of all adapted layers. A subclass computes P."""

    class Options(Section):
        strength: float

    options: Options

    def declares(self, stage: Stage) -> tuple[str, ...]:
        return (self.name,) if self.options.strength else ()

    def after_backward(self, step: Step, gradients: Shards) -> dict[str, float]:
        if not self.options.strength:
            return {}
        value = self.penalty(step.stage.model, gradients)
        return {self.name: float(value)} if step.logged else {}

    def penalty(self, model: nn.Module, gradients: Shards) -> Tensor:
        """Add the gradient of strength * P; return its value, a scalar."""
        raise NotImplementedError
