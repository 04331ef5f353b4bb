"""Sizes that are cut until they are level."""

from __future__ import annotations


def levelled(sizes: list[int], excess: int) -> list[int]:
    """Take ``excess`` from the largest sizes until they are level, then from all of them alike."""
    sizes = list(sizes)
    while excess > 0:
        largest = max(sizes)
        at = [i for i, size in enumerate(sizes) if size == largest]
        below = max((size for size in sizes if size < largest), default=0)
        each, rest = divmod(min(excess, (largest - below) * len(at)), len(at))
        for place, i in enumerate(at):
            sizes[i] -= each + (place < rest)
        excess -= each * len(at) + rest
    return sizes
