"""Elastic weight consolidation: weights that mattered to past tasks stay near their values after these."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from holdfast.api.rows import TokenRow
from holdfast.api.stage import Stage
from holdfast.engines.shards import Shards
from holdfast.engines.vectors import weights
from holdfast.losses.common import wide
from holdfast.methods.parts.penalty import QuadraticPenalty, row_gradients


class EWC(QuadraticPenalty):
    """Elastic weight consolidation (Kirkpatrick et al., 2017, arXiv 1612.00796; online: Schwarz et al., 2018).

    separate (equation 3 of the first): L = L_task + strength / 2 * sum_k <F_k, (theta - theta*_k)^2>
    online (arXiv 1805.06370, equations 8 and 9): L = L_task + strength / 2 * <F, (theta - theta*)^2>

    theta*_k are the weights after stage k, theta* those after the last stage, and F <- gamma F + F_t after stage t. F_k
    is the diagonal of the Fisher matrix of task k: the mean over its rows of (d log p(y | x) / d theta)^2, with
    p(y | x) the probability of the whole answer.
    """

    name = "ewc"

    class Options(QuadraticPenalty.Options):
        strength: float = Field(1000.0, ge=0, description="lambda, the weight of the penalty, which has a factor 1/2")
        variant: Literal["separate", "online"] = Field(
            "separate",
            description="separate: a term for each past task; online: one term around the last stage's weights",
        )
        gamma: float = Field(
            0.95, ge=0, le=1, description="online: what a stage leaves of the Fisher matrix of those before it"
        )
        fisher: Literal["labels", "model"] = Field(
            "labels",
            description="labels: the answers as given (empirical Fisher); model: each answer token drawn from the "
            "model's own distribution at its place",
        )
        samples: int = Field(256, ge=1, description="train rows of a task from which its Fisher matrix is estimated")

        @model_validator(mode="after")
        def _used(self) -> EWC.Options:
            if self.variant == "separate" and "gamma" in self.model_fields_set:
                raise ValueError(
                    "gamma: would change nothing, since variant separate weighs all past tasks alike; use variant "
                    "online"
                )
            return self

    options: Options

    @property
    def needs_rows(self) -> bool:
        return self.options.strength > 0

    def after_stage(self, stage: Stage) -> None:
        if self.options.strength == 0:
            return
        rows = stage.sample(self.options.samples, stage.random(self.name))
        drawn = stage.random(f"{self.name}/answers") if self.options.fisher == "model" else None
        fisher = diagonal_fisher(stage, rows, drawn)
        anchor = weights(stage.model).copy()
        if self.options.variant == "separate":
            self.add_term(fisher, anchor)
        else:
            past = self.importance or fisher.zeros_like()
            self.set_term(fisher.add_(past, self.options.gamma), anchor)


def diagonal_fisher(stage: Stage, rows: Sequence[TokenRow], drawn: random.Random | None = None) -> Shards:
    """Mean over rows of the squared gradient of log p(answer | prompt), each row by itself, without dropout.

    Args:
        drawn: draws each answer token from the model, given the true tokens before it, so that the mean estimates the
            model's own Fisher matrix; without it the answers are those of the rows.

    Returns:
        float32, one tensor a trainable parameter, all entries >= 0.
    """

    def nll(logits: Tensor, answer: Tensor) -> Tensor:
        answer = answer if drawn is None else draw(logits, drawn)
        return F.cross_entropy(wide(logits), answer, reduction="sum")

    total = weights(stage.model).zeros_like()
    for gradient in row_gradients(stage, rows, nll):
        for name, g in gradient.tensors.items():
            total.tensors[name].addcmul_(g, g)
    return total.scale_(1 / len(rows))


@torch.no_grad()
def draw(logits: Tensor, chance: random.Random) -> Tensor:
    """One token of each distribution, by inverting its cumulative sum: logits [tokens, vocab] -> int64 [tokens]."""
    cumulated = wide(logits).softmax(-1).cumsum(-1)
    points = torch.tensor([[chance.random()] for _ in logits], device=logits.device) * cumulated[:, -1:]
    return torch.searchsorted(cumulated, points, right=True).squeeze(-1).clamp_max_(logits.shape[-1] - 1)
