"""What the rows of a split ask and say, as digests by which duplicates, contradictions and overlap are counted."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from holdfast.api.task import Example, Fingerprint

SIZE = 16
"""Bytes of a digest."""

Digests = NDArray[np.bytes_]


class Survey:
    """Of the rows of a split, which pass once; whatever is asked of it is about all of them.

    Attributes:
        fingerprint: of the split alone, to which others can be added.
    """

    def __init__(self) -> None:
        self.fingerprint = Fingerprint()
        self._prompts, self._rows = bytearray(), bytearray()

    @classmethod
    def found(cls, prompts: bytes, different: int) -> Survey:
        """The survey of which these are known; it has no fingerprint."""
        survey = cls()
        survey._prompts, survey.different = bytearray(prompts), different
        return survey

    def passing(self, examples: Iterable[Example]) -> Iterator[Example]:
        """The examples, which are taken in as they pass; all must."""
        for example in self.fingerprint.passing(examples):
            prompt = _prompt(example)
            self._prompts += prompt
            self._rows += _digest(prompt + example.answer.encode(errors="surrogatepass"))
            yield example

    @cached_property
    def prompts(self) -> Digests:
        """Digests of what the rows ask, in their order, [rows]."""
        return np.frombuffer(self._prompts, f"S{SIZE}")

    @cached_property
    def different(self) -> int:
        """Rows that differ in what they ask or in their answer."""
        return len(np.unique(np.frombuffer(self._rows, f"S{SIZE}")))

    @cached_property
    def asked(self) -> Digests:
        """Different digests among the prompts, sorted."""
        return np.unique(self.prompts)

    def asks(self, prompts: Digests) -> NDArray[np.bool_]:
        """Which of some prompts the split asks, too."""
        if not len(self.asked):
            return np.zeros(len(prompts), bool)
        places = np.searchsorted(self.asked, prompts)
        return self.asked[np.minimum(places, len(self.asked) - 1)] == prompts


def surveyed(examples: Iterable[Example]) -> Survey:
    """The survey of a split, all of which is gone through."""
    survey = Survey()
    for _ in survey.passing(examples):
        pass
    return survey


def _prompt(example: Example) -> bytes:
    turns = example.turns[:-1]
    asked = example.text or (example.tools, [(turn.role, turn.content, turn.calls, *turn.shown) for turn in turns])
    return _digest(repr(asked).encode(errors="surrogatepass"))


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=SIZE).digest()
