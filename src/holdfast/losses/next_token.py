"""Next-token loss: the negative log-likelihood of the supervised tokens, plain and chunked."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from holdfast.losses.chunked import CHUNK_SIZE, Head, chunked_loss
from holdfast.losses.common import wide


def next_token_nll(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of the negative log-likelihoods of the supervised tokens, and their number.

    Position s predicts token s + 1, so the first label of a row never counts.

    Args:
        logits: [batch, seq, vocab], any floating type; the softmax is computed in float32 or wider.
        labels: [batch, seq], int64; -100 where not supervised.

    Returns:
        (sum in nats, a scalar with gradient, float32 or wider; number of supervised tokens, an int64 scalar).
    """
    # Shift the labels, not the logits: a slice of the logits would copy them all.
    targets = F.pad(labels[:, 1:], (0, 1), value=-100)
    nll = F.cross_entropy(wide(logits).flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum")
    return nll, supervised_tokens(labels)


def prediction_nll(logits: Tensor, labels: Tensor) -> Tensor:
    """Negative log-likelihood of each supervised token; :func:`next_token_nll` is the sum of these.

    Args:
        logits: [supervised tokens, vocab], those that predict them, row by row, any floating type; the softmax is
            computed in float32 or wider.
        labels: [batch, seq], int64; -100 where not supervised.

    Returns:
        [supervised tokens], in nats, with gradient, float32 or wider.
    """
    return F.cross_entropy(wide(logits), labels[:, 1:][labels[:, 1:] != -100], reduction="none")


def token_nll(logits: Tensor, labels: Tensor) -> Tensor:
    """:func:`prediction_nll` of all logits, each in the place of its token.

    Args:
        logits: [batch, seq, vocab], or those that predict supervised tokens alone, [supervised tokens, vocab]; any
            floating type. The softmax is computed in float32 or wider.
        labels: [batch, seq], int64; -100 where not supervised.

    Returns:
        [batch, seq], in nats, with gradient, float32 or wider: of the token in that place; 0 where it is not supervised
        and in the first place, which nothing predicts.
    """
    return in_places(prediction_nll(supervised_logits(logits, labels), labels), labels)


def chunked_next_token_nll(
    hidden: Tensor,
    head: Head,
    labels: Tensor,
    *,
    chunk_size: int = CHUNK_SIZE,
) -> tuple[Tensor, Tensor]:
    """:func:`next_token_nll` of a head's logits, of which at most ``chunk_size`` tokens are held at a time.

    Value and gradient are those of the plain function on the logits of :class:`Head`. Matrix products run in the head's
    data type, or in autocast's; softmax, loss and the head's gradient are accumulated in float32 or wider. Tokens that
    are not supervised cost nothing.

    Args:
        hidden: [batch, seq, hidden], after the final norm.
        head: the head of [vocab, hidden] that is applied to it.
        labels: [batch, seq], int64; -100 where not supervised.
        chunk_size: tokens whose logits are held at a time.

    Returns:
        (sum in nats, a scalar with gradient to hidden and the head's weight and bias where they require it; number of
        supervised tokens, an int64 scalar). It cannot be differentiated twice.

    Raises:
        ConfigError: chunk_size is below 1.
    """
    supervised = labels[:, 1:] != -100
    targets = labels[:, 1:][supervised].unsqueeze(-1)

    def loss(logits: Tensor, chunk: slice) -> tuple[Tensor, Tensor]:
        log_p = F.log_softmax(logits, dim=-1)
        target = targets[chunk]
        total = -log_p.gather(-1, target).sum()
        return total, log_p.exp_().scatter_add_(-1, target, torch.full_like(target, -1, dtype=log_p.dtype))

    return chunked_loss(hidden[:, :-1][supervised], head.cast(), loss, chunk_size), supervised_tokens(labels)


def predicting(labels: Tensor) -> Tensor:
    """The positions that predict a supervised token, bool [rows, seq]: the next token has a label."""
    return F.pad(labels[:, 1:] != -100, (0, 1))


def supervised_logits(logits: Tensor, labels: Tensor) -> Tensor:
    """The logits that predict the supervised tokens of labels [batch, seq]: [supervised tokens, vocab], row by row.

    Args:
        logits: of all positions, [batch, seq, vocab]; or these already.
    """
    return logits if logits.dim() == 2 else logits[predicting(labels)]


def in_places(values: Tensor, labels: Tensor) -> Tensor:
    """A value for each supervised token, [supervised tokens], in the token's place: [batch, seq], 0 elsewhere."""
    supervised = labels[:, 1:] != -100
    return F.pad(values.new_zeros(supervised.shape).masked_scatter(supervised, values), (1, 0))


def supervised_tokens(labels: Tensor) -> Tensor:
    """Number of tokens that :func:`next_token_nll` counts: labels [batch, seq] without the first of each row."""
    return torch.count_nonzero(labels[:, 1:] != -100)
