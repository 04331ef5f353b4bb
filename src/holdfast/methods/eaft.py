"""EAFT: tokens that the model is sure about count less, so that what it contradicts is not overwritten."""

from __future__ import annotations

import math
from typing import Any

from pydantic import Field
from torch import Tensor

from holdfast.api.method import Method
from holdfast.api.rows import Batch
from holdfast.api.stage import Step
from holdfast.config.section import Section
from holdfast.losses.common import wide
from holdfast.losses.next_token import in_places, supervised_logits


class EAFT(Method):
    """Entropy-adaptive fine-tuning (Diao et al., 2026, arXiv 2601.02151, equations 2 and 3).

    L = - sum_t H_t^exponent log p(y_t | x, y_<t), with H_t the entropy of the ``top_k`` most likely tokens, whose
    probabilities are made to sum to 1, divided by ln ``top_k``. The sum is divided by the number of tokens, as that of
    the plain loss is. H_t has no gradient.
    """

    name = "eaft"
    reads_all_logits = False

    class Options(Section):
        top_k: int = Field(20, ge=2, description="K, the tokens of whose probabilities the entropy is taken")
        exponent: float = Field(1.0, ge=0, description="power of the normalised entropy; 0: every token counts 1")

    options: Options

    def loss_weights(self, step: Step, batch: Batch, outputs: Any) -> Tensor | None:
        if not self.options.exponent:
            return None
        labels = batch["labels"]
        entropy = top_entropy(supervised_logits(outputs.logits.detach(), labels), self.options.top_k)
        return in_places(entropy.pow(self.options.exponent), labels)


def top_entropy(logits: Tensor, count: int) -> Tensor:
    """Entropy of the ``count`` most likely tokens, normalised to [0, 1]: logits [..., vocab] -> float32 [...]."""
    count = min(count, logits.shape[-1])
    log_p = wide(logits.topk(count, dim=-1).values).log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1) / math.log(count)
