"""Batches of sequences that are read without gradients, bounded by their padded tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeVar

from holdfast.engines.process import Process

Answer = TypeVar("Answer")

MOST = 2
"""Times the batch size: so many short sequences are in a batch at most."""


class Size(NamedTuple):
    """What an item takes in a batch.

    Attributes:
        rows: its sequences, all as long as the longest.
        begun: tokens that each of them begins with and that are read beforehand.
        rest: all its other tokens.
    """

    rows: int
    begun: int
    rest: int


def by_tokens(order: Sequence[int], sizes: Sequence[Size], batch_size: int) -> list[list[int]]:
    """Divide items, in this order, into batches that have no more padded tokens than ``batch_size`` of the longest
    sequences, so that shorter ones fill them, too; an item that is larger is a batch of its own.

    A batch has no more than :data:`MOST` times ``batch_size`` sequences. Items with and without a beginning that is
    read beforehand are not mixed. Several processes have a batch each, where there are so many sequences.

    Args:
        order: numbers of the items, those of similar length beside each other.
        sizes: by number.
    """
    each = -(-sum(sizes[i].rows for i in order) // Process.this().world)
    rows = min(MOST * batch_size, each)
    tokens = min(batch_size, each) * max((sizes[i].begun + sizes[i].rest for i in order), default=0)
    batches: list[list[int]] = []
    held = Size(0, 0, 0)
    for i in order:
        one = sizes[i]
        wider = Size(held.rows + one.rows, max(held.begun, one.begun), max(held.rest, one.rest))
        fits = wider.rows <= rows and wider.rows * (wider.begun + wider.rest) <= tokens
        if batches and fits and bool(held.begun) == bool(one.begun):
            batches[-1].append(i)
            held = wider
        else:
            batches.append([i])
            held = one
    return batches


def by_batch(
    batches: Sequence[list[int]], answers: Callable[[list[int]], list[Answer]]
) -> Iterator[tuple[list[int], list[Answer]]]:
    """Each batch with its answers, in every process; each process computes its share.

    Processes go through the model together: a process without a batch computes the last one, which is not used.
    """
    process = Process.this()
    for first in range(0, len(batches), process.world):
        part = batches[first : first + process.world]
        gathered = process.gather(answers(part[min(process.rank, len(part) - 1)]))
        yield from zip(part, gathered, strict=False)
