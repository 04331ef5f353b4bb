"""The rows of a split, file by file: in lists, or, of large files, made while they are gone through."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice
from typing import Any

from holdfast.data.files import RawRow, where
from holdfast.errors import ColumnsError, did_you_mean

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


def renamed(row: dict[str, Any], columns: Mapping[str, str | None], place: str) -> dict[str, Any]:
    """A row with other names of columns, without those whose new name is None.

    Args:
        place: of the row, for messages; where empty, a column may be absent.
    """
    if not columns:
        return row
    for column in columns:
        if column not in row and place and columns[column] is not None:
            raise ColumnsError(f"{place}: columns: there is no column {column!r}{did_you_mean(column, row)}")
    kept = [key for key in row if columns.get(key, key) is not None]
    new = RawRow({columns.get(key) or key: row[key] for key in kept})
    new.line = getattr(row, "line", None)
    if hasattr(row, "index"):
        new.index = row.index
    if len(new) < len(kept):
        taken = next(new for old, new in columns.items() if new in row and new not in columns and new != old)
        raise ColumnsError(f"{place}: columns: there is a column {taken!r} already; rename that one too")
    return new


def all_renamed(
    rows: Iterable[dict[str, Any]], columns: Mapping[str, str | None], file: str
) -> Iterator[dict[str, Any]]:
    for position, row in enumerate(rows):
        yield renamed(row, columns, where(file, getattr(row, "index", position), row))
