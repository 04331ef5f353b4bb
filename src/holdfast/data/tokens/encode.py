"""Texts to token ids with a fast tokenizer, in one process or several; the order stays that of the texts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
from tokenizers import Tokenizer

from holdfast.system.workers import in_order


@dataclass(frozen=True)
class Encoder:
    """How a document becomes tokens; small and picklable, so that each process can have it.

    Attributes:
        tokenizer: JSON of a tokenizer of the tokenizers library.
        begin: ids before a document.
        end: ids after a document.
        dtype: of the ids, as numpy names it.
    """

    tokenizer: str
    begin: tuple[int, ...]
    end: tuple[int, ...]
    dtype: str

    def load(self) -> _Encode:
        return _Encode(self)


class _Encode:
    """The tokenizer, loaded."""

    def __init__(self, how: Encoder):
        self._how = how
        self._tokenizer = Tokenizer.from_str(how.tokenizer)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True  # as text: what is written in a document is never a special token

    def __call__(self, texts: list[str]) -> np.ndarray:
        """The documents end to end, [tokens]."""
        ids: list[int] = []
        for encoding in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False):
            ids += self._how.begin
            ids += encoding.ids
            ids += self._how.end
        return np.array(ids, self._how.dtype)


class HasTexts(Protocol):
    """Documents that are encoded together, and whatever else belongs to them."""

    @property
    def texts(self) -> list[str]: ...


Part = TypeVar("Part", bound=HasTexts)


def encode(parts: Iterable[Part], encoder: Encoder, processes: int = 1) -> Iterator[tuple[Part, np.ndarray]]:
    """Encode parts and give each, in their order, with its token ids [tokens].

    Args:
        parts: taken one at a time, no more of them ahead than there are processes.
        processes: as of :func:`~holdfast.system.workers.in_order`.

    Raises:
        RuntimeError: one of the processes was killed.
    """
    return in_order(parts, encoder.load, processes, given=texts_of)


def texts_of(part: HasTexts) -> list[str]:
    """The documents of a part."""
    return part.texts
