"""Rows of large files, and examples of large splits, in a file of this process, so that they do not stay in memory."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from operator import attrgetter
from typing import Any, Generic, NamedTuple, TypeVar, overload

from holdfast.api.task import Example, Turn
from holdfast.data.files import RawRow
from holdfast.errors import DataError

LARGE_ROWS = 20_000
LARGE_TEXT = 10_000_000
"""A split of so many rows, or of so many characters, lies on disk, and has its tokens in Arrow."""

T = TypeVar("T")

_said = attrgetter("role", "content", "cut", "trained", "reasoning", "calls", "name")
_asked = attrgetter("file", "row", "text", "number", "choices", "also_right", "tools", "good", "answered")


class Codec(NamedTuple, Generic[T]):
    """How an item is written as JSON and read again; what cannot be written so is None, and stays in memory."""

    write: Callable[[T], str | None]
    read: Callable[[str], T]


class OnDisk(Sequence[T]):
    """Items in a file without a name, which goes when they go; each is read when it is asked for.

    A slice gives items on disk, too.

    Raises:
        DataError: the folder for temporary files cannot be written to, or its disk is full.
    """

    def __init__(self, items: Iterable[T], codec: Codec[T]):
        self._codec = codec
        self._ends = array("q", [0])
        self._in_memory: dict[int, T] = {}
        self._places: Sequence[int] = ()
        try:
            self._file = tempfile.TemporaryFile()  # noqa: SIM115 - closed when these items go
            for item in items:
                self._append(item)
            self._file.flush()
        except OSError as error:
            raise DataError(
                f"{tempfile.gettempdir()}: rows cannot be written to the folder for temporary files: "
                f"{error.strerror or error}; free some space, or name another folder in TMPDIR"
            ) from None
        self._places = range(len(self._ends) - 1)

    def _append(self, item: T) -> None:
        text = self._codec.write(item)
        if text is None:
            self._in_memory[len(self._ends) - 1] = item
        content = (text or "").encode()
        self._file.write(content)
        self._ends.append(self._ends[-1] + len(content))

    def at(self, places: Iterable[int]) -> OnDisk[T]:
        """The items at some places, in that order."""
        other: OnDisk[T] = object.__new__(OnDisk)
        vars(other).update(vars(self), _places=array("q", (self._places[place] for place in places)))
        return other

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, place: int) -> T: ...

    @overload
    def __getitem__(self, place: slice) -> OnDisk[T]: ...

    def __getitem__(self, place: int | slice) -> T | OnDisk[T]:
        if isinstance(place, slice):
            return self.at(range(*place.indices(len(self))))
        return self._item(self._places[place])

    def __iter__(self) -> Iterator[T]:
        return map(self._item, self._places)

    def __reduce__(self) -> tuple[Any, ...]:
        return list, (list(self),)

    def _item(self, number: int) -> T:
        if number in self._in_memory:
            return self._in_memory[number]
        start, end = self._ends[number], self._ends[number + 1]
        return self._codec.read(os.pread(self._file.fileno(), end - start, start).decode())


def _write_example(example: Example) -> str | None:
    if example.columns is not None or example.pictures:
        return None
    return json.dumps([_asked(example), [_said(turn) for turn in example.turns]])


def _read_example(text: str) -> Example:
    (file, row, content, number, choices, also_right, tools, good, answered), turns = json.loads(text)
    return Example(
        file=sys.intern(file),
        row=row,
        turns=tuple(
            Turn(role, said, None if cut is None else tuple(cut), trained, reasoning, tuple(calls), name)
            for role, said, cut, trained, reasoning, calls, name in turns
        ),
        text=content,
        number=number,
        choices=tuple(choices),
        also_right=tuple(also_right),
        tools=tools,
        good=good,
        answered=answered,
    )


def _write_row(row: dict[str, Any]) -> str:
    return json.dumps([dict(row), getattr(row, "line", None), getattr(row, "index", None)])


def _read_row(text: str) -> dict[str, Any]:
    values, line, index = json.loads(text)
    row = RawRow(values)
    row.line = line
    if index is not None:
        row.index = index
    return row


EXAMPLES = Codec(_write_example, _read_example)
ROWS = Codec(_write_row, _read_row)
"""Of rows that hold what JSON holds."""


def gathered(items: Iterable[T], codec: Codec[T]) -> list[T] | OnDisk[T]:
    """All items: in a list while they are few and small, else on disk."""
    items, first, size = iter(items), list[T](), 0
    for item in items:
        first.append(item)
        size += len(codec.write(item) or "")
        if len(first) >= LARGE_ROWS or size >= LARGE_TEXT:
            return OnDisk(chain(first, items), codec)
    return first


def chosen(items: Sequence[T], places: Iterable[int]) -> Sequence[T]:
    """The items at some places, in that order, where the items lie."""
    return items.at(places) if isinstance(items, OnDisk) else [items[place] for place in places]
