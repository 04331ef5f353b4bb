"""Next-token loss: the negative log-likelihood of the supervised tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def next_token_nll(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of the negative log-likelihoods of the supervised tokens, and how many there are.

    Position s predicts token s + 1, so the first label of a row is never counted.

    Args:
        logits: [batch, seq, vocab], any floating type; the softmax is taken in float32.
        labels: [batch, seq], int64; -100 where not supervised.

    Returns:
        (sum in nats, a float32 scalar with gradient; number of supervised tokens, an int64 scalar).
    """
    targets = labels[:, 1:].reshape(-1)
    flat = logits[:, :-1].reshape(-1, logits.shape[-1]).float()
    return F.cross_entropy(flat, targets, ignore_index=-100, reduction="sum"), supervised_tokens(labels)


def supervised_tokens(labels: Tensor) -> Tensor:
    """Number of tokens that :func:`next_token_nll` counts: labels [batch, seq] without the first of each row."""
    return torch.count_nonzero(labels[:, 1:] != -100)
