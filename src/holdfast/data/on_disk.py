"""Examples of large splits in a file of this process, so that they do not stay in memory."""

from __future__ import annotations

import json
import os
import tempfile
from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from operator import attrgetter
from typing import Any, overload

from holdfast.api.task import Example, Turn
from holdfast.data.survey import Survey, surveyed
from holdfast.errors import DataError

LARGE_ROWS = 20_000
LARGE_TEXT = 10_000_000
"""A split of so many rows, or of so many characters, lies on disk, and has its tokens in Arrow."""

TOGETHER, BLOCK = 256, 2**20
"""So many examples in order are read at once, if they are no more bytes than these."""

_said = attrgetter("role", "content", "cut", "trained", "reasoning", "calls", "name")
_asked = attrgetter("row", "text", "number", "choices", "also_right", "tools", "good", "answered")


class OnDisk(Sequence[Example]):
    """Examples in a file without a name, which goes when they go; each is read when it is asked for.

    A slice gives examples on disk, too. What JSON cannot hold, such as pictures, stays in memory.

    Args:
        survey: what the examples pass through on their way.

    Raises:
        DataError: the folder for temporary files cannot be written to, or its disk is full.
    """

    def __init__(self, examples: Iterable[Example], survey: Survey | None = None):
        self._survey = survey
        self._ends = array("q", [0])
        self._file_numbers = array("I")
        self._in_memory: dict[int, Example] = {}
        self._files: dict[str, int] = {}
        try:
            self._file = tempfile.TemporaryFile()  # noqa: SIM115 - closed when these examples go
            for example in examples if survey is None else survey.passing(examples):
                self._append(example)
            self._file.flush()
        except OSError as error:
            raise DataError(
                f"{tempfile.gettempdir()}: rows cannot be written to the folder for temporary files: "
                f"{error.strerror or error}; free some space, or name another folder in TMPDIR"
            ) from None
        self._names = list(self._files)
        self._places: Sequence[int] = range(len(self._ends) - 1)

    def _append(self, example: Example) -> None:
        content = b""
        if example.columns is not None or example.pictures:
            self._in_memory[len(self._ends) - 1] = example
        else:
            content = json.dumps((_asked(example), [_said(turn) for turn in example.turns])).encode()
        self._file.write(content)
        self._file_numbers.append(self._files.setdefault(example.file, len(self._files)))
        self._ends.append(self._ends[-1] + len(content))

    @property
    def files(self) -> set[str]:
        """The files that the examples came from."""
        return {self._names[file] for file in {self._file_numbers[number] for number in self._places}}

    def at(self, places: Iterable[int]) -> OnDisk:
        """The examples at some places, in that order."""
        other: OnDisk = object.__new__(OnDisk)
        places = array("q", (self._places[place] for place in places))
        vars(other).update(vars(self), _places=places, _survey=None)
        return other

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, place: int) -> Example: ...

    @overload
    def __getitem__(self, place: slice) -> OnDisk: ...

    def __getitem__(self, place: int | slice) -> Example | OnDisk:
        if isinstance(place, slice):
            return self.at(range(*place.indices(len(self))))
        return self._example(self._places[place])

    def __iter__(self) -> Iterator[Example]:
        for start in range(0, len(self), TOGETHER):
            numbers = self._places[start : start + TOGETHER]
            begin, end = self._ends[min(numbers)], self._ends[max(numbers) + 1]
            if end - begin > BLOCK:
                yield from map(self._example, numbers)
                continue
            content = self._content(begin, end)
            for number in numbers:
                yield self._read(number, content[self._ends[number] - begin : self._ends[number + 1] - begin])

    def sizes(self) -> Iterator[int]:
        """Bytes of each example in the file."""
        return (self._ends[number + 1] - self._ends[number] for number in self._places)

    @property
    def survey(self) -> Survey:
        """The survey of the examples."""
        if self._survey is None:
            self._survey = surveyed(self)
        return self._survey

    def __reduce__(self) -> tuple[Any, ...]:
        return list, (list(self),)

    def _example(self, number: int) -> Example:
        return self._read(number, self._content(self._ends[number], self._ends[number + 1]))

    def _content(self, begin: int, end: int) -> str:
        return os.pread(self._file.fileno(), end - begin, begin).decode("ascii")

    def _read(self, number: int, content: str) -> Example:
        if not content:
            return self._in_memory[number]
        (row, text, count, choices, also_right, tools, good, answered), turns = json.loads(content)
        return Example(
            self._names[self._file_numbers[number]],
            row,
            tuple([_turn(*turn) for turn in turns]),
            text,
            count,
            tuple(choices),
            tuple(also_right),
            tools,
            good,
            answered=answered,
        )


def _turn(role: Any, content: str, cut: Any, trained: bool, reasoning: Any, calls: list[str], name: Any) -> Turn:
    return Turn(role, content, None if cut is None else tuple(cut), trained, reasoning, tuple(calls), name)


def characters(example: Example) -> int:
    """Characters that an example says, about."""
    return len(example.text or "") + sum([len(turn.content) for turn in example.turns])


def gathered(examples: Iterable[Example], survey: bool = False) -> Sequence[Example]:
    """All examples: in a list while they are few and small, else on disk.

    Args:
        survey: whether their survey will be asked for.
    """
    examples, first, size = iter(examples), list[Example](), 0
    for example in examples:
        first.append(example)
        size += characters(example)
        if len(first) >= LARGE_ROWS or size >= LARGE_TEXT:
            return OnDisk(chain(first, examples), Survey() if survey else None)
    return first


def chosen(examples: Sequence[Example], places: Iterable[int]) -> Sequence[Example]:
    """The examples at some places, in that order, where the examples lie."""
    return examples.at(places) if isinstance(examples, OnDisk) else [examples[place] for place in places]
