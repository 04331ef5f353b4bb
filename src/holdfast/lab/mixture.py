"""Sequences of one or several token files, in an order that depends on the seed alone."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from holdfast.data.tokens.file import TokenRows

PATTERN = 1 << 16
"""Number of sequences after which the turns of the files repeat: shares are exact to 1 / PATTERN."""


class Mixture(Sequence[dict[str, Any]]):
    """``length`` sequences: the files take evenly spread turns, and each pass through a file has a new order.

    The sequence at a place is a pure function of (seed, place), so that a run can continue anywhere, with any number
    of processes.

    Args:
        parts: the files' sequences.
        weights: shares of the sequences, relative to each other.
        length: how many sequences there are.
        seed: of the orders.
    """

    def __init__(self, parts: Sequence[TokenRows], weights: Sequence[float] | np.ndarray, length: int, seed: int):
        self.parts, self.length, self.seed = list(parts), length, seed
        self._shares = np.asarray(weights, dtype=float) / np.sum(weights)
        self._turns, self._before = turns(self._shares)

    def first(self, length: int) -> Mixture:
        """Its first sequences, at most ``length``."""
        return Mixture(self.parts, self._shares, min(length, self.length), self.seed)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return [self[p] for p in range(*place.indices(self.length))]
        if not 0 <= place < self.length:
            raise IndexError(place)
        part, row = self.source(place)
        return self.parts[part][row]

    def source(self, place: int) -> tuple[int, int]:
        """Which file, and which of its sequences, stands at a place."""
        rounds, turn = divmod(place, PATTERN)
        part = int(self._turns[turn])
        count = rounds * int(self._before[PATTERN, part]) + int(self._before[turn, part])
        epoch, at = divmod(count, len(self.parts[part]))
        return part, int(_order(self.seed, part, epoch, len(self.parts[part]))[at])


def turns(shares: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Spread the turns of the parts evenly: of the n_k turns of part k, the j-th comes at (j + 1/2) / n_k.

    Args:
        shares: [parts], of sum 1.

    Returns:
        the part at each turn, [PATTERN]; the number of turns that each part had before it, int64 [PATTERN + 1, parts].
    """
    counts = np.floor(shares * PATTERN).astype(int)
    rest = shares * PATTERN - counts
    counts[np.argsort(-rest, kind="stable")[: PATTERN - counts.sum()]] += 1
    times = np.concatenate([(np.arange(n) + 0.5) / n for n in counts if n])
    owners = np.repeat(np.arange(len(counts)), counts)
    order = owners[np.argsort(times, kind="stable")]
    before = np.zeros((PATTERN + 1, len(counts)), dtype=np.int64)
    before[np.arange(1, PATTERN + 1), order] = 1
    return order, before.cumsum(axis=0)


@lru_cache(maxsize=16)
def _order(seed: int, part: int, epoch: int, rows: int) -> np.ndarray:
    return np.random.default_rng([seed, part, epoch]).permutation(rows)
