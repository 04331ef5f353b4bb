"""The task's loss where methods weigh its tokens: sum of weight times negative log-likelihood, on Trainer's scale."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from holdfast.api.method import Method
from holdfast.api.rows import IGNORED, Batch
from holdfast.api.stage import Step
from holdfast.errors import ConfigError, MethodError
from holdfast.losses.chunked import CHUNK_SIZE, chunked_loss_of_logits
from holdfast.losses.next_token import supervised_logits, token_nll
from holdfast.training.batches import is_token_batch

NEAR = 1e-3
"""How far Trainer's loss may be from the next-token loss of its logits, as a share of it."""


def has_logits(outputs: Any, longest: int) -> bool:
    """Whether a forward pass gave logits of every token, or of all supervised ones, with gradient."""
    logits = None if outputs is None else outputs.get("logits")
    return isinstance(logits, Tensor) and logits.requires_grad and (logits.dim() == 2 or logits.shape[1] >= longest)


def aligned_logits(outputs: Any, batch: Any, longest: int, names: str) -> Tensor:
    """The logits of a micro-batch's own rows and tokens, [rows, seq, vocab], with gradient; or those that predict its
    supervised tokens, [supervised tokens, vocab], where the pass gave no others.

    Args:
        longest: tokens of a row in the forward pass, in which longer extra rows may have taken part.
        names: of the methods that need them.

    Raises:
        ConfigError: there are none.
    """
    if not is_token_batch(batch) or not has_logits(outputs, longest):
        raise ConfigError(
            f"method {names}: weighs the tokens of the next-token loss, and this trainer does not compute it from the "
            "labels of every token (smoothed labels, or another loss); Trainer with the model's own loss would do"
        )
    if outputs["logits"].dim() == 2:
        return outputs["logits"]
    rows, seq = batch["labels"].shape
    return outputs["logits"][:rows, -longest:][:, :seq]  # without the virtual tokens of a soft prompt


def combined_weights(methods: Sequence[Method], step: Step, batch: Batch, outputs: Any) -> Tensor | None:
    """The product of the methods' weights, [rows, seq], without gradient; None where no method weighs this batch.

    Raises:
        MethodError: weights are of another shape.
    """
    product: Tensor | None = None
    for method in methods:
        weights = method.loss_weights(step, batch, outputs)
        if weights is None:
            continue
        shape = batch["labels"].shape
        if weights.shape not in (shape, shape[:1]):
            raise MethodError(
                f"method {method.name!r}: its loss_weights are of shape {list(weights.shape)}; they must be "
                f"{list(shape)}, one for each token, or {list(shape[:1])}, one for each row"
            )
        weights = weights.detach().float().reshape(len(weights), -1).expand(shape)
        product = weights if product is None else product * weights
    return product


def check_plain_loss(loss: Tensor, logits: Tensor, labels: Tensor, factor: Tensor | float, names: str) -> None:
    """Check that Trainer's loss is the next-token loss that is to be weighed.

    Args:
        factor: what Trainer multiplies the sum over tokens by.

    Raises:
        ConfigError: it is another one.
    """
    plain = float(factor * token_nll(logits.detach(), labels).sum())
    if abs(float(loss.detach()) - plain) > NEAR * abs(plain) + 1e-6:
        raise ConfigError(
            f"method {names}: weighs the tokens of the next-token loss, and this trainer's loss is another one "
            f"({float(loss.detach()):.6g}, not {plain:.6g}); leave out losses of your own and auxiliary losses of the "
            "model"
        )


def weighted_nll(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Sum over supervised tokens of weight times negative log-likelihood: a scalar with gradient to the logits.

    Args:
        logits: [rows, seq, vocab], or [supervised tokens, vocab].
        labels: int64 [rows, seq]; -100 where not supervised.
        weights: float32 [rows, seq], of the token in each place; that of the first one never counts.
    """
    supervised = labels[:, 1:] != IGNORED
    targets, factors = labels[:, 1:][supervised].unsqueeze(-1), weights[:, 1:][supervised].unsqueeze(-1)

    def loss(part: Tensor, chunk: slice) -> tuple[Tensor, Tensor]:
        log_p = F.log_softmax(part, dim=-1)
        target, factor = targets[chunk], factors[chunk].to(part.dtype)
        total = -(factor * log_p.gather(-1, target)).sum()
        gradient = log_p.exp_().scatter_add_(-1, target, torch.full_like(factor, -1.0))
        return total, gradient.mul_(factor)

    return chunked_loss_of_logits(supervised_logits(logits, labels), loss, CHUNK_SIZE)
