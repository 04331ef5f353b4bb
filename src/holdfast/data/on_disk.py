"""Examples of large splits in a file of this process, so that they do not stay in memory."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from operator import attrgetter
from typing import Any, BinaryIO, overload

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
            self._file: BinaryIO = tempfile.TemporaryFile()  # noqa: SIM115 - closed when these examples go
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
        self._start = 0  # of the first one in the file
        self._digest: bytes | None = None

    def _append(self, example: Example) -> None:
        content = b""
        if example.columns is not None or example.pictures:
            self._in_memory[len(self._ends) - 1] = example
        else:
            content = _written(example)
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
        vars(other).update(vars(self), _places=places, _survey=None, _digest=None)
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

    @property
    def digest(self) -> bytes:
        """SHA-256 over the content of the file, and which examples of it these are."""
        if self._digest is None:
            digest = hashlib.sha256()
            for part in self._blocks():
                digest.update(part)
            digest.update(repr(self._in_memory).encode())
            digest.update(array("q", self._places).tobytes())
            self._digest = digest.digest()
        return self._digest

    def _blocks(self) -> Iterator[bytes]:
        for begin in range(0, self._ends[-1], BLOCK):
            yield os.pread(self._file.fileno(), min(BLOCK, self._ends[-1] - begin), self._start + begin)

    @property
    def in_memory(self) -> bool:
        """Whether something stays in memory."""
        return bool(self._in_memory)

    def facts(self) -> dict[str, Any]:
        """What :meth:`found` needs, as JSON."""
        return {"names": self._names, "digest": self.digest.hex()}

    def contents(self) -> dict[str, Iterable[bytes]]:
        """The contents that :meth:`found` needs, by name."""
        numbers = {"ends": self._ends, "files": self._file_numbers, "places": array("q", self._places)}
        return {"text": self._blocks()} | {name: [of.tobytes()] for name, of in numbers.items()}

    @classmethod
    def found(cls, file: BinaryIO, facts: dict[str, Any], places: dict[str, tuple[int, int]], survey: Survey) -> OnDisk:
        """The examples of which a file holds the contents, none of which was in memory.

        Args:
            facts: of the examples, as :meth:`facts` gave them.
            places: where each content begins, and its bytes.
            survey: of the examples.
        """

        def numbers(kind: str, name: str) -> array[int]:
            begin, size = places[name]
            found = array(kind)
            found.frombytes(os.pread(file.fileno(), size, begin))
            return found

        other: OnDisk = object.__new__(cls)
        other._file, other._start, other._survey = file, places["text"][0], survey
        other._ends, other._file_numbers = numbers("q", "ends"), numbers("I", "files")
        other._places, other._in_memory, other._names = numbers("q", "places"), {}, facts["names"]
        other._digest = bytes.fromhex(facts["digest"])
        return other

    def __reduce__(self) -> tuple[Any, ...]:
        return list, (list(self),)

    def _example(self, number: int) -> Example:
        return self._read(number, self._content(self._ends[number], self._ends[number + 1]))

    def _content(self, begin: int, end: int) -> str:
        return os.pread(self._file.fileno(), end - begin, self._start + begin).decode("ascii")

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


def _written(example: Example) -> bytes:
    return json.dumps((_asked(example), [_said(turn) for turn in example.turns])).encode()


def digest_of(examples: Sequence[Example]) -> bytes:
    """SHA-256 over the content and the row numbers of examples, in order; where their files lie does not count."""
    if isinstance(examples, OnDisk):
        return examples.digest
    digest = hashlib.sha256()
    for example in examples:
        digest.update(_written(example))
        digest.update(repr(example.pictures).encode())
    return digest.digest()


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
