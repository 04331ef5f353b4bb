"""Tokenised rows of large splits as Arrow columns: in memory, or in a file that is mapped and found again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import reduce
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
from numpy.typing import NDArray

from holdfast.api.task import Example
from holdfast.data.cache_file import DIGEST, code, complete, is_whole, partial_file
from holdfast.data.encode import Encoder
from holdfast.data.joined_rows import JoinedRows
from holdfast.data.on_disk import LARGE_ROWS, LARGE_TEXT, OnDisk, characters, digest_of
from holdfast.data.tally import NOTHING_SEEN, Seen
from holdfast.system.files import json_text

CHUNK = 1000
"""Rows that are tokenised together; a row that is large itself is a chunk of its own."""

FACTS = b"facts"
"""Metadata of a batch: the :class:`Facts` of the examples that it was made of."""


class ArrowRows(JoinedRows):
    """Rows as :class:`~holdfast.data.encode.Encoder` made them, each made anew when it is asked for.

    Args:
        batches: their columns, in order: lists of int32, or int64.
        seen: what was seen of the examples.
    """

    def __init__(self, batches: Sequence[pa.RecordBatch], seen: Seen = NOTHING_SEEN):
        self.seen = seen
        super().__init__(batch.num_rows for batch in batches)
        self._columns = [_columns(batch) for batch in batches]

    def beyond(self, name: str, known: int) -> set[int]:
        """The tokens in a column that are ``known`` or more."""
        columns = [of_batch[name].values for of_batch in self._columns if name in of_batch]
        return {token for values in columns for token in np.unique(values[values >= known]).tolist()}

    def row(self, place: int) -> dict[str, Any]:
        batch, at = self.part_of(place)
        return {name: column.value(at) for name, column in self._columns[batch].items()}


class Facts(NamedTuple):
    """What else is known of encoded examples: the places of those that were shortened, and of those that lost a part of
    the answer; the tokens of the longest answer; and what was seen of them."""

    shortened: list[int]
    cut: list[int]
    longest: int
    seen: Seen = NOTHING_SEEN

    def moved(self, by: int) -> Facts:
        """The facts where so many examples stand before."""
        shortened, cut = ([by + place for place in places] for places in (self.shortened, self.cut))
        return Facts(shortened, cut, self.longest, self.seen)


class _Column(NamedTuple):
    """A column of ints, or of lists of them, of which ``offsets`` says where each begins and ends."""

    values: NDArray[Any]
    offsets: NDArray[Any] | None

    def value(self, at: int) -> Any:
        if self.offsets is None:
            return int(self.values[at])
        return self.values[self.offsets[at] : self.offsets[at + 1]].tolist()


def _columns(batch: pa.RecordBatch) -> dict[str, _Column]:
    found = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        if pa.types.is_list(column.type):
            found[name] = _Column(column.values.to_numpy(), column.offsets.to_numpy())
        else:
            found[name] = _Column(column.to_numpy(), None)
    return found


def is_large(examples: Sequence[Example]) -> bool:
    """Whether the tokens of a split are better in Arrow than in lists."""
    return len(examples) >= LARGE_ROWS or sum(map(characters, examples)) >= LARGE_TEXT


def chunks(examples: Sequence[Example]) -> Iterator[range]:
    """The places of all examples in order, of each chunk about so many that its tokens are few beside the rest."""
    start, size = 0, 0
    for end, more in enumerate(examples.sizes() if isinstance(examples, OnDisk) else map(characters, examples), 1):
        size += more
        if end - start == CHUNK or size >= LARGE_TEXT // 10:
            yield range(start, end)
            start, size = end, 0
    if start < len(examples):
        yield range(start, len(examples))


def as_batch(rows: Sequence[dict[str, Any]]) -> pa.RecordBatch:
    """Rows that have the same columns, of ints below 2^31 or lists of them."""
    kinds = {name: pa.list_(pa.int32()) if isinstance(value, list) else pa.int64() for name, value in rows[0].items()}
    return pa.RecordBatch.from_pydict({name: pa.array([row[name] for row in rows], kinds[name]) for name in kinds})


class RowFile:
    """The file of a split's rows in the user's folder, whose name tells what they were made of and by what.

    Args:
        folder: ``data.cache``.
    """

    def __init__(self, folder: Path, encoder: Encoder, examples: Sequence[Example]):
        self.path = folder / f"{_digest(encoder, examples)}.arrow"

    def read(self) -> tuple[ArrowRows, Facts] | None:
        """The rows and the facts of all examples; None if there is no whole file of that name."""
        return _found(self.path)

    @contextmanager
    def writing(self) -> Iterator[_Writer]:
        """Write the rows anew; only what is complete and closed takes the file's place.

        Raises:
            DataError: the folder cannot be written to, or its disk is full.
        """
        with partial_file(self.path) as partial:
            yield _Writer(partial, self.path)


class _Writer:
    """Writes batches to a file of its own name."""

    def __init__(self, path: Path, place: Path):
        self.path, self._place = path, place
        self._file: pa.RecordBatchFileWriter | None = None

    def write(self, batch: pa.RecordBatch, facts: Facts) -> None:
        if self._file is None:
            self._file = pa.ipc.new_file(str(self.path), batch.schema)
        self._file.write_batch(batch, custom_metadata={FACTS: json_text(facts)})

    def finish(self, keep: bool) -> ArrowRows:
        """The rows, mapped; the file is kept under the name by which it is found again, or removed when they go."""
        if self._file is None:
            return ArrowRows([])
        self._file.close()
        complete(self.path)
        rows, _ = _read(self.path)
        if keep and (other := _found(self._place)):  # another run was faster: a file that others have mapped stays
            rows, _ = other
        elif keep:
            self.path.replace(self._place)
        return rows


def _found(path: Path) -> tuple[ArrowRows, Facts] | None:
    """What a file holds; None if there is none, or its bytes are not those that were written."""
    try:
        return _read(path) if is_whole(path) else None
    except (OSError, pa.ArrowException, ValueError, LookupError, TypeError):  # a file of an earlier version, say
        return None


def _read(path: Path) -> tuple[ArrowRows, Facts]:
    content = pa.memory_map(str(path)).read_buffer()
    reader = pa.ipc.open_file(content.slice(0, content.size - DIGEST().digest_size))
    parts = [reader.get_batch_with_custom_metadata(number) for number in range(reader.num_record_batches)]
    facts = [_facts(*json.loads(metadata[FACTS])) for _, metadata in parts]
    seen = reduce(Seen.and_then, (of_batch.seen for of_batch in facts), NOTHING_SEEN)
    together = Facts(
        [place for of_batch in facts for place in of_batch.shortened],
        [place for of_batch in facts for place in of_batch.cut],
        max(of_batch.longest for of_batch in facts),
        seen,
    )
    return ArrowRows([batch for batch, _ in parts], seen), together


def _facts(shortened: list[int], cut: list[int], longest: int, seen: list[Any]) -> Facts:
    return Facts(shortened, cut, longest, Seen(*seen))


def _digest(encoder: Encoder, examples: Sequence[Example]) -> str:
    """SHA-256 over the examples' content and row numbers, the encoder, and the code and libraries that make rows."""
    import tokenizers
    import transformers

    versions = [transformers.__version__, tokenizers.__version__]
    found = hashlib.sha256(repr([versions, sorted(encoder.identity().items()), code()]).encode())
    found.update(digest_of(examples))
    return found.hexdigest()
