"""Synaptic intelligence: weights whose steps lowered the loss of past tasks stay near their past values."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field

from holdfast.api.stage import Stage, Step
from holdfast.engines.shards import Shards
from holdfast.engines.vectors import weights
from holdfast.methods.parts.penalty import QuadraticPenalty


class SI(QuadraticPenalty):
    """Synaptic intelligence (Zenke, Poole and Ganguli, 2017, arXiv 1703.04200, equations 3 to 5).

    L = L_task + strength / 2 * <Omega, (theta - theta*)^2>

    theta* are the weights after the last stage, and Omega <- max(0, Omega + omega / (Delta^2 + xi)) after each stage.
    omega = - sum over the stage's steps of g * (theta after the step - theta before it) is each weight's share in the
    decrease of the loss. g is the step's gradient of the loss, before clipping and without the penalty's; Delta is how
    far the weight moved in the stage.
    """

    name = "si"
    turn = -2

    class Options(QuadraticPenalty.Options):
        strength: float = Field(
            0.2, ge=0, description="weight of the penalty, which has a factor 1/2: twice the paper's c"
        )
        xi: float = Field(
            1e-6, gt=0, description="damping: bounds the importance of weights that moved less than its square root"
        )

    options: Options
    saved: ClassVar[tuple[str, ...]] = ("importance", "anchor", "path")

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.path: Shards | None = None  # omega of this stage so far
        self.gradient: Shards | None = None  # of the step under way
        self.before: Shards | None = None  # the weights before that step

    def before_stage(self, stage: Stage) -> None:
        if self.options.strength > 0:
            self.anchor = weights(stage.model).copy()
            self.path = self.anchor.zeros_like()

    def after_backward(self, step: Step, gradients: Shards) -> dict[str, float]:
        if self.path is not None:
            self.gradient, self.before = gradients.copy(), weights(step.stage.model).copy()
        return super().after_backward(step, gradients)

    @torch.no_grad()
    def after_step(self, step: Step, weights: Shards) -> None:
        if self.path is None or self.gradient is None or self.before is None:
            return
        for name, t in weights.tensors.items():
            moved = t.float() - self.before.tensors[name]
            self.path.tensors[name].addcmul_(self.gradient.tensors[name], moved, value=-1.0)
        self.gradient = self.before = None

    @torch.no_grad()
    def after_stage(self, stage: Stage) -> None:
        if self.path is None:
            return
        assert self.anchor is not None
        theta = weights(stage.model).copy()
        importance = {}
        for name, path in self.path.tensors.items():
            moved = theta.tensors[name] - self.anchor.tensors[name]
            share = path.div_(moved.square_().add_(self.options.xi))
            past = 0 if self.importance is None else self.importance.tensors[name]
            importance[name] = (past + share).clamp_min_(0)
        self.set_term(theta.like(importance), theta)
        self.path = None
