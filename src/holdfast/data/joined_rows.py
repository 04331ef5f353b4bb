"""Rows of several parts as one sequence, each made when it is asked for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import Any, overload


class JoinedRows(Sequence[dict[str, Any]], ABC):
    """The rows of parts, one part after another; :meth:`row` makes one.

    Args:
        sizes: rows of each part.
    """

    def __init__(self, sizes: Iterable[int]):
        self._ends = list(accumulate(sizes))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @overload
    def __getitem__(self, place: int) -> dict[str, Any]: ...

    @overload
    def __getitem__(self, place: slice) -> list[dict[str, Any]]: ...

    def __getitem__(self, place: int | slice) -> dict[str, Any] | list[dict[str, Any]]:
        if isinstance(place, slice):
            return [self[number] for number in range(*place.indices(len(self)))]
        if not -len(self) <= place < len(self):
            raise IndexError(f"row {place} of {len(self)}")
        return self.row(place % len(self))

    @abstractmethod
    def row(self, place: int) -> dict[str, Any]:
        """The row at a place, from 0."""

    def part_of(self, place: int) -> tuple[int, int]:
        """The number of the part in which a row stands, and its place there."""
        part = bisect_right(self._ends, place)
        return part, place - (self._ends[part - 1] if part else 0)
