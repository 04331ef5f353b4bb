"""The train rows of a large task as tokens in Arrow, made chunk by chunk in several processes."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from holdfast.api.task import Example
from holdfast.data.arrow_rows import ArrowRows, Facts, RowFile, as_batch, chunks
from holdfast.data.encode import Encoder
from holdfast.data.on_disk import chosen
from holdfast.data.tally import NOTHING_SEEN, Seen, Tally
from holdfast.errors import DataError
from holdfast.system.workers import forks, in_order


def usable(
    examples: Sequence[Example], encode: Callable[[Sequence[Example]], list[Any]], bad: list[str]
) -> tuple[list[Example], list[Any]]:
    """The examples that can be encoded, and their codes; one by one only where not all of them can."""
    examples = list(examples)
    try:
        return examples, encode(examples)
    except DataError:
        kept, codes = [], []
    for example in examples:
        try:
            codes += encode([example])
        except DataError as error:
            bad.append(str(error))
        else:
            kept.append(example)
    return kept, codes


class _Encoded(NamedTuple):
    """What became of the examples of a chunk.

    Attributes:
        places: of those that could be encoded, among all.
        batch: their rows; None if there are none.
        bad: what is wrong with the others.
        told: the warnings that the encoder gave, in this chunk or before.
    """

    places: list[int]
    batch: Any
    facts: Facts
    bad: list[str]
    tally: Tally
    told: dict[str, str]


def _encode(encoder: Encoder, examples: Sequence[Example], chunk: range) -> _Encoded:
    own, given, bad = encoder.apart(), list(examples[chunk.start : chunk.stop]), list[str]()
    kept, rows = usable(given, own.encode_all, bad)
    used = {id(example) for example in kept}
    shortened, cut = (
        [place for place, example in enumerate(kept) if (example.file, example.row) in of]
        for of in (own.tally.shortened, own.tally.cut)
    )
    return _Encoded(
        [place for place, example in zip(chunk, given, strict=True) if id(example) in used],
        as_batch(rows) if rows else None,
        Facts(shortened, cut, own.tally.longest, Seen.of(kept, own.sign_as_text)),
        bad,
        own.tally,
        dict(encoder.told),
    )


def encode_large(
    examples: Sequence[Example], encoder: Encoder, cache: str | None, bad: list[str]
) -> tuple[Sequence[Example], ArrowRows]:
    """As :func:`usable`, with the rows in Arrow: of an earlier start, if ``data.cache`` has them.

    Raises:
        DataError: ``data.cache`` cannot be written to.
    """
    file = None if cache is None else RowFile(Path(cache), encoder, examples)
    if file is not None and (found := file.read()):
        rows, facts = found
        shortened, cut = (
            {(example.file, example.row) for example in chosen(examples, places)}
            for places in (facts.shortened, facts.cut)
        )
        encoder.tally.add(Tally(shortened, cut, facts.longest))
        return examples, rows
    kept = array("q")  # places of examples
    batches, seen = list[Any](), NOTHING_SEEN
    parts = list(chunks(examples))
    made = in_order(
        parts,
        lambda: partial(_encode, encoder, examples),
        min(forks(), len(parts)),
        given=lambda chunk: chunk,
        start="fork",
    )
    with nullcontext() if file is None else file.writing() as writer:
        for _, encoded in made:
            bad += encoded.bad
            encoder.tally.add(encoded.tally)
            encoder.tell(encoded.told)
            if encoded.batch is None:
                continue
            if writer is None:
                batches.append(encoded.batch)
                seen = seen.and_then(encoded.facts.seen)
            else:
                writer.write(encoded.batch, encoded.facts.moved(len(kept)))
            kept.extend(encoded.places)
        rows = ArrowRows(batches, seen) if writer is None else writer.finish(keep=len(kept) == len(examples))
    return examples if len(kept) == len(examples) else chosen(examples, kept), rows
