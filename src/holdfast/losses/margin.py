"""GeRe's threshold-based margin loss: keep each activation in the state that the teacher's had (arXiv 2508.04676)."""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from holdfast.errors import ConfigError, did_you_mean
from holdfast.losses.common import wide

BELOW, BETWEEN, ABOVE = 0, 1, 2
Reduction = Literal["nonzero", "mean"]
_EPSILON = 1e-8
_TOKENS = 1024  # that are converted to float32 at a time


def classify(hidden: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """State of each activation: 0 (below) where h ≤ low, 2 (above) where h ≥ high, 1 (between) elsewhere.

    Args:
        hidden: [batch, seq, hidden], any floating type; compared in float32 or wider.
        low, high: [hidden], thresholds: mean ± k std of each dimension, low ≤ high.

    Returns:
        uint8, the shape of hidden. An activation that never varied (h = low = high) is between; its margin loss is then
        |h − low|, the sum of the margins of the two other states.
    """
    hidden = wide(hidden)
    return (hidden > low.to(hidden)).to(torch.uint8) + (hidden >= high.to(hidden)).to(torch.uint8)


def margin_loss(
    hidden: Tensor,
    classes: Tensor,
    low: Tensor,
    high: Tensor,
    mask: Tensor | None = None,
    reduction: Reduction = "nonzero",
) -> Tensor:
    """GeRe's threshold-based margin loss (TM): how far activations have left their state.

    With h the student's activation and relu(x) = max(x, 0), each entry contributes

        relu(h − low)                       if it was below,
        relu(h − high) + relu(low − h)      if it was between,
        relu(high − h)                      if it was above,

    that is, its distance to the interval (−∞, low], [low, high] or [high, ∞) of its state.

    Args:
        hidden: [batch, seq, hidden], the student's activations, any floating type; computed in float32 or wider.
        classes: [batch, seq, hidden], int8 or uint8: :func:`classify` of the teacher's activations.
        low, high: [hidden], the thresholds; they get no gradient.
        mask: [batch, seq], not zero where a position counts; None counts all.
        reduction: "nonzero", as published: the sum divided by the number of entries that are not zero, plus 1e-8, so
            that the loss does not shrink as violations get rarer; "mean": the mean over all unmasked entries.

    Returns:
        A scalar with gradient to hidden, float32 or wider; 0 if no position counts. The backward pass needs one int8
        an entry.

    Raises:
        ConfigError: the reduction is unknown.
    """
    total, entries = margin_sums(hidden, classes, low, high, mask, reduction)
    return total / (entries + _EPSILON if reduction == "nonzero" else entries)


def margin_sums(
    hidden: Tensor,
    classes: Tensor,
    low: Tensor,
    high: Tensor,
    mask: Tensor | None = None,
    reduction: Reduction = "nonzero",
) -> tuple[Tensor, Tensor]:
    """The sum of the margins, and the number of entries that :func:`margin_loss` divides it by.

    Returns:
        (a scalar with gradient to hidden, float32 or wider; a scalar: with reduction nonzero the number of entries that
        are not zero, otherwise that of all unmasked entries, at least those of one position).

    Raises:
        ConfigError: the reduction is unknown.
    """
    if reduction not in get_args(Reduction):
        raise ConfigError(f"reduction: {reduction!r} is unknown{did_you_mean(reduction, get_args(Reduction))}")
    assert hidden.shape == classes.shape, (hidden.shape, classes.shape)
    total, violations = _Margin.apply(
        hidden.flatten(end_dim=-2),
        classes.flatten(end_dim=-2),
        low,
        high,
        None if mask is None else mask.flatten().bool(),
    )
    if reduction == "nonzero":
        return total, violations
    positions = torch.tensor(hidden[..., 0].numel()) if mask is None else torch.count_nonzero(mask)
    return total, positions.to(hidden.device).clamp(min=1) * hidden.shape[-1]


def dynamic_weight(ce: Tensor, term: Tensor) -> Tensor:
    """GeRe's ``dy``: w = ce / (term + 1e-8), which makes w * term as large as ce; a scalar without gradient."""
    return ce.detach() / (term.detach() + _EPSILON)


class _Margin(torch.autograd.Function):
    """(sum of the margins, number of entries that are not zero) of hidden [tokens, hidden], chunk by chunk."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, classes: Tensor, low: Tensor, high: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        total = wide(hidden.new_zeros(()))
        violations = torch.zeros((), dtype=torch.int64, device=hidden.device)
        low, high = low.to(total), high.to(total)
        side = torch.empty_like(classes, dtype=torch.int8)
        for start in range(0, len(hidden), _TOKENS):
            tokens = slice(start, start + _TOKENS)
            state = classes[tokens]
            lower = torch.where(state == ABOVE, high, low).masked_fill_(state == BELOW, -math.inf)
            upper = torch.where(state == BELOW, low, high).masked_fill_(state == ABOVE, math.inf)
            h = wide(hidden[tokens])
            margin = h - h.clamp(lower, upper)
            if mask is not None:
                margin.masked_fill_(~mask[tokens, None], 0)
            side[tokens] = margin.sign()
            violations += torch.count_nonzero(margin)
            total += margin.abs_().sum()
        ctx.save_for_backward(side)
        ctx.dtype = hidden.dtype
        return total, violations

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, factor: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        (side,) = ctx.saved_tensors
        return side * factor.to(ctx.dtype), None, None, None, None
