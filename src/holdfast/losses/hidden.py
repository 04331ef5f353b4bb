"""Distances between a student's hidden states and a teacher's: GeRe's L1 and L2 baselines (arXiv 2508.04676)."""

from __future__ import annotations

from torch import Tensor

from holdfast.losses.common import unmasked, wide


def l1_loss(hidden: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """mean |h − t| over the entries of the unmasked positions (positions x hidden).

    Args:
        hidden: [batch, seq, hidden], any floating type; computed in float32 or wider.
        target: the same shape; it gets no gradient.
        mask: [batch, seq], not zero where a position counts; None counts all.

    Returns:
        A scalar with gradient, float32 or wider; 0 if no position counts.
    """
    difference = _difference(hidden, target, mask)
    return difference.abs().sum() / max(difference.numel(), 1)


def l2_loss(hidden: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """mean (h − t)² over the entries of the unmasked positions; arguments and result as in :func:`l1_loss`."""
    difference = _difference(hidden, target, mask)
    return difference.square().sum() / max(difference.numel(), 1)


def _difference(hidden: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
    assert hidden.shape == target.shape, (hidden.shape, target.shape)
    return wide(unmasked(hidden, mask)) - wide(unmasked(target.detach(), mask))
