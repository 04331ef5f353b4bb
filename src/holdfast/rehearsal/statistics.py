"""Statistics of a set of token sequences: token frequencies, repetition, and overlap with another set."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Rows = Sequence[np.ndarray]
"""Token ids of each sequence, int64 [tokens]."""

LONG = 8  # tokens of an n-gram that hardly occurs twice by chance


@dataclass(frozen=True)
class Statistics:
    """What is in the sequences.

    Attributes:
        tokens: number of tokens in all sequences.
        ids: the tokens that occur, the most frequent first, [distinct tokens].
        counts: how often each of them occurs, [distinct tokens].
        entropy: of the tokens' frequencies, in nats.
        distinct: by n, the share of the n-grams that are distinct; None if there is no n-gram.
        repeating: share of the sequences in which an 8-gram occurs twice; None if no sequence has an 8-gram.
        near_duplicates: share of the sequences with more than half of their 8-grams in other sequences, too; None if no
            sequence has an 8-gram.
    """

    tokens: int
    ids: np.ndarray
    counts: np.ndarray
    entropy: float
    distinct: dict[int, float | None]
    repeating: float | None
    near_duplicates: float | None

    @classmethod
    def of(cls, rows: Rows) -> Statistics:
        """The statistics of at least one sequence of at least one token."""
        ids, counts = np.unique(np.concatenate(rows), return_counts=True)
        order = np.argsort(-counts, kind="stable")
        share = counts / counts.sum()
        distinct = {}
        for n in (1, 2, 4, LONG):
            grams, _ = ngrams(rows, n)
            distinct[n] = len(np.unique(grams)) / len(grams) if len(grams) else None
        repeating, near = _repetition(rows)
        return cls(
            int(counts.sum()),
            ids[order],
            counts[order],
            -float((share * np.log(share)).sum()),
            distinct,
            repeating,
            near,
        )


def ngrams(rows: Rows, n: int) -> tuple[np.ndarray, np.ndarray]:
    """A 64-bit hash of each n-gram, uint64, and the number of its row."""
    factors = np.random.default_rng(n).integers(2**63, size=n, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    hashes, places = [np.empty(0, np.uint64)], [np.empty(0, np.int64)]
    for number, row in enumerate(rows):
        if len(row) >= n:
            windows = np.lib.stride_tricks.sliding_window_view(_mixed(row.astype(np.uint64)), n)
            hashes.append((windows * factors).sum(1, dtype=np.uint64))
            places.append(np.full(len(windows), number))
    return np.concatenate(hashes), np.concatenate(places)


def shared(rows: Rows, others: Rows, n: int = LONG) -> float | None:
    """Share of the n-grams of ``rows`` that occur in ``others``; None if ``rows`` have none."""
    grams, _ = ngrams(rows, n)
    return float(np.isin(grams, ngrams(others, n)[0]).mean()) if len(grams) else None


def by_rank(counts: np.ndarray, points: int = 200) -> tuple[list[int], list[float]]:
    """Ranks, from 1, evenly spaced on a logarithmic scale, and the share of the token at each."""
    ranks = np.unique(np.geomspace(1, len(counts), min(points, len(counts))).round().astype(int))
    return ranks.tolist(), (counts[ranks - 1] / counts.sum()).tolist()


def histogram(values: Sequence[float], bins: int = 30) -> tuple[list[float], list[int], float]:
    """Centres and counts of bins of equal width, and the width, which is whole for whole numbers."""
    low, high = min(values), max(values)
    whole = all(float(value).is_integer() for value in values)
    width = math.ceil((high - low + 1) / bins) if whole else (high - low) / bins or 1.0
    edges = np.arange(low, high + width * 1.001, width) - (0.5 if whole else 0)
    if edges[-1] <= high:
        edges = np.append(edges, edges[-1] + width)
    counts, edges = np.histogram(values, edges)
    return ((edges[:-1] + edges[1:]) / 2).tolist(), counts.tolist(), float(width)


def _repetition(rows: Rows) -> tuple[float | None, float | None]:
    """``repeating`` and ``near_duplicates`` of :class:`Statistics`."""
    grams, places = ngrams(rows, LONG)
    if not len(grams):
        return None, None
    pairs, times = np.unique(np.stack([places.astype(np.uint64), grams]), axis=1, return_counts=True)
    owners, distinct = pairs[0].astype(np.int64), pairs[1]
    having, each = np.unique(owners, return_counts=True)
    repeating = len(np.unique(owners[times > 1])) / len(having)
    _, index, holders = np.unique(distinct, return_inverse=True, return_counts=True)
    elsewhere = np.bincount(owners, weights=holders[index] > 1, minlength=len(rows))[having]
    return repeating, float((elsewhere > each / 2).mean())


def _mixed(values: np.ndarray) -> np.ndarray:
    """The finalizer of splitmix64, which spreads similar numbers."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        values = (values ^ (values >> np.uint64(shift))) * np.uint64(factor)
    return values ^ (values >> np.uint64(31))
