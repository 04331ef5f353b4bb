"""Loss and perplexity: how likely the answers, or texts, are."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from holdfast.api.scorer import Record, Scorer


class Loss(Scorer):
    """Negative log-likelihood per supervised token over all rows, in nats; lower is better.

    A record's ``nats`` is the sum over its ``tokens``; the task's loss is their quotient over all rows, not a mean of
    rows.
    """

    reads = "loss"
    lower_is_better = True

    def row(self, record: Record) -> float:
        return record["nats"] / record["tokens"]

    def statistics(self, records: Sequence[Record]) -> NDArray[np.float64]:
        return np.array([[record["nats"], record["tokens"]] for record in records], dtype=float)


class Perplexity(Loss):
    """exp of :class:`Loss`; lower is better."""

    def row(self, record: Record) -> float:
        return float(_exp(np.array(super().row(record))))

    def total(self, sums: NDArray[np.float64]) -> NDArray[np.float64]:
        return _exp(super().total(sums))


def _exp(loss: NDArray[np.float64]) -> NDArray[np.float64]:
    with np.errstate(over="ignore"):  # a perplexity may be infinite
        return np.exp(loss)


SCORERS = [
    Loss("loss", about="nats per token of the answers, or of texts; lower is better"),
    Perplexity("perplexity", about="exp of the loss; lower is better"),
]
