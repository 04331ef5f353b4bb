"""The rows of a split, file by file: in lists, or, of large files, made while they are gone through."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice
from typing import Any

Row = dict[str, Any]


class Once(Iterable[Row]):
    """Rows to go through once, of which the first may be looked at before.

    What is wrong with a row is raised when it is its turn.
    """

    def __init__(self, rows: Iterable[Row]):
        self._rows: Iterator[Row] = iter(rows)
        self._gone = False

    @cached_property
    def start(self) -> list[Row]:
        """The first row, if there is one."""
        return list(islice(self._rows, 1))

    def __bool__(self) -> bool:
        return bool(self.start)

    def __iter__(self) -> Iterator[Row]:
        assert not self._gone, "these rows were gone through already"
        self._gone = True
        return chain(self.start, self._rows)


@dataclass
class Part:
    """The rows of one file of a split."""

    file: str
    rows: list[Row] | Once


def first_part(parts: Iterable[Part]) -> Part:
    """The first part of a split that has rows."""
    return next(part for part in parts if part.rows)


def first_row(rows: Iterable[Row]) -> Row:
    """The first of some rows."""
    return rows.start[0] if isinstance(rows, Once) else next(iter(rows))


def alike(rows: Iterable[Row], changed: Iterable[Row]) -> list[Row] | Once:
    """Changed rows, to be gone through once where the rows are, else in a list."""
    return Once(changed) if isinstance(rows, Once) else list(changed)


def limited(parts: Sequence[list[Row] | Once], limit: int) -> Iterator[list[Row] | Once]:
    """The first rows of parts that are gone through one after another; all rows are read."""
    left = limit

    def first(rows: Iterable[Row]) -> Iterator[Row]:
        nonlocal left
        for row in rows:
            if left > 0:
                left -= 1
                yield row

    lazily = any(isinstance(rows, Once) for rows in parts)
    for rows in parts:
        yield Once(first(rows)) if lazily else list(first(rows))
