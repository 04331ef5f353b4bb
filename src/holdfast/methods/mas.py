"""Memory aware synapses: weights to which the model's output is sensitive stay near their past values."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field
from torch import Tensor

from holdfast.api.rows import TokenRow
from holdfast.api.stage import Stage
from holdfast.engines.shards import Shards
from holdfast.engines.vectors import weights
from holdfast.losses.common import wide
from holdfast.methods.parts.penalty import QuadraticPenalty, row_gradients


class MAS(QuadraticPenalty):
    """Memory aware synapses (Aljundi et al., 2018, arXiv 1711.09601), with the squared length of the output.

    L = L_task + strength / 2 * <Omega, (theta - theta*)^2>

    theta* are the weights after the last stage, and Omega <- Omega + mean over the task's rows of
    | d ||z(x)||^2 / d theta | after each stage. z(x) are the logits that predict the tokens of the answer, and ||z||^2
    is their squared length, averaged over these tokens. No label is a target.
    """

    name = "mas"

    class Options(QuadraticPenalty.Options):
        strength: float = Field(
            0.002, ge=0, description="weight of the penalty, which has a factor 1/2: twice the paper's lambda"
        )
        samples: int = Field(256, ge=1, description="train rows of a task from which the importance is estimated")

    options: Options

    @property
    def needs_rows(self) -> bool:
        return self.options.strength > 0

    def after_stage(self, stage: Stage) -> None:
        if self.options.strength == 0:
            return
        importance = sensitivity(stage, stage.sample(self.options.samples, stage.random(self.name)))
        if self.importance is not None:
            importance.add_(self.importance)
        self.set_term(importance, weights(stage.model).copy())


def sensitivity(stage: Stage, rows: Sequence[TokenRow]) -> Shards:
    """Mean over rows of the absolute gradient of the squared length of the logits that predict the answer.

    Each row counts by itself, without dropout.

    Returns:
        float32, one tensor a trainable parameter, all entries >= 0.
    """

    def squared_length(logits: Tensor, answer: Tensor) -> Tensor:
        return wide(logits).square().sum() / max(1, len(logits))

    total = weights(stage.model).zeros_like()
    for gradient in row_gradients(stage, rows, squared_length):
        for name, g in gradient.tensors.items():
            total.tensors[name].add_(g.abs_())
    return total.scale_(1 / len(rows))
