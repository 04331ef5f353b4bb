"""Elastic weight consolidation: keep weights that mattered to past tasks near where they were."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import nn

from holdfast.config import Section
from holdfast.losses.next_token import next_token_nll
from holdfast.methods.base import Method, Stage, State, Step
from holdfast.shards import Shards, gradient_of, weights


class EWC(Method):
    """Elastic weight consolidation (Kirkpatrick et al., 2017, arXiv 1612.00796, equation 3), one penalty a past task.

    L = L_task + strength / 2 * sum_k sum_i F_k,i (theta_i - theta*_k,i)^2

    F_k is the diagonal of the empirical Fisher matrix of task k, the mean over samples (x, y) of
    (d log p(y | x) / d theta)^2 with p(y | x) the probability of the whole answer. The sum over past tasks needs only
    sum_k F_k and sum_k F_k theta*_k, so the memory does not grow with the number of tasks.
    """

    name = "ewc"

    class Options(Section):
        strength: float = Field(1.0, gt=0, description="lambda, the weight of the penalty")
        samples: int = Field(256, ge=1, description="train rows of a task from which its Fisher matrix is estimated")

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.fisher: Shards | None = None  # sum_k F_k
        self.pull: Shards | None = None  # sum_k F_k theta*_k
        self.constant = 0.0  # sum_k <F_k theta*_k, theta*_k>

    def declares(self, stage: Stage) -> tuple[str, ...]:
        return (self.name,) if self.fisher is not None else ()

    def after_backward(self, step: Step, gradients: Shards) -> dict[str, float]:
        if self.fisher is None:
            return {}
        penalty = self.penalty_gradient(weights(step.stage.model))
        gradients.add_(penalty)
        return {self.name: self.penalty(weights(step.stage.model))} if step.logged else {}

    def penalty(self, theta: Shards) -> float:
        """strength / 2 * sum_k <F_k, (theta - theta*_k)^2>, the value of the extra term."""
        assert self.fisher is not None and self.pull is not None
        total = self.constant
        for name, t in theta.tensors.items():
            w, f, p = t.double(), self.fisher.tensors[name].double(), self.pull.tensors[name].double()
            total += float((w * (f * w - 2 * p)).sum())
        return 0.5 * self.options.strength * total

    @torch.no_grad()
    def penalty_gradient(self, theta: Shards) -> Shards:
        """strength * sum_k F_k (theta - theta*_k), float32."""
        assert self.fisher is not None and self.pull is not None
        gradient = {}
        for name, t in theta.tensors.items():
            f, p = self.fisher.tensors[name], self.pull.tensors[name]
            gradient[name] = (f * t.float()).sub_(p).mul_(self.options.strength)
        return Shards(gradient)

    def after_stage(self, stage: Stage) -> None:
        anchor = weights(stage.model).copy()
        rows = stage.random(self.name).sample(list(stage.rows), min(self.options.samples, len(stage.rows)))
        fisher = diagonal_fisher(stage, rows)
        pull = Shards({name: f * anchor.tensors[name] for name, f in fisher.tensors.items()})
        self.constant += sum(
            float((p.double() * anchor.tensors[name].double()).sum()) for name, p in pull.tensors.items()
        )
        self.fisher = fisher if self.fisher is None else self.fisher.add_(fisher)
        self.pull = pull if self.pull is None else self.pull.add_(pull)

    def state(self) -> State:
        if self.fisher is None or self.pull is None:
            return {}
        return self.fisher.state("fisher") | self.pull.state("pull") | {"constant": self.constant}

    def load_state(self, state: State, model: nn.Module) -> None:
        if state:
            theta = weights(model)
            self.fisher = Shards.from_state(state, "fisher", like=theta)
            self.pull = Shards.from_state(state, "pull", like=theta)
            self.constant = state["constant"]


def diagonal_fisher(stage: Stage, rows: list[Any]) -> Shards:
    """Mean over rows of the squared gradient of log p(answer | prompt), each row by itself, without dropout.

    Returns:
        float32, one tensor a trainable parameter, all entries >= 0.
    """
    model = stage.model
    training = model.training
    model.eval()
    total = weights(model).zeros_like()
    for row in rows:
        batch = stage.collate([row])
        labels = batch.pop("labels")
        nll, _ = next_token_nll(model(**batch).logits, labels)
        for name, g in gradient_of(nll, model).tensors.items():
            total.tensors[name].addcmul_(g, g)
    model.train(training)
    return total.scale_(1 / len(rows))
