"""Tokens of long texts, made stretch by stretch: a tokenizer takes more than a hundred bytes a character at work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

STRETCH, OVERLAP = 100_000, 4_000
"""Characters of a stretch, and of them those that the next one begins with."""

AGREED = 16
"""Tokens in a row that two stretches must have in common, in the same places, to be joined among them.

A sequence of tokens is the one of byte-pair encoding if that is so of every two neighbours. Where words are divided
first, that depends on a few characters around.
"""


class LongEncoding:
    """The tokens of a text, as the tokenizers library's ``Encoding`` has them.

    Attributes:
        offsets: [start, end) of each in the text, [tokens, 2].
    """

    def __init__(self, ids: NDArray[np.int32], offsets: NDArray[np.int32]):
        self._ids, self.offsets = ids, offsets

    def __len__(self) -> int:
        return len(self._ids)

    @property
    def ids(self) -> list[int]:
        """The tokens, each time in a new list."""
        return self._ids.tolist()


def encoding_of(text: str, encode: Callable[[str], Any]) -> Any:
    """The encoding of a text; where stretches of a long one do not agree, as in a line of one letter, of it as a whole.

    Args:
        encode: gives the ``Encoding`` of a text.
    """
    if len(text) <= STRETCH:
        return encode(text)
    found = np.empty((0, 3), np.int32)  # token, start, end
    for start in range(0, len(text) - OVERLAP, STRETCH - OVERLAP):
        encoding = encode(text[start : start + STRETCH])
        offsets = np.array(encoding.offsets, np.int32).reshape(-1, 2) + start
        more = np.column_stack([np.array(encoding.ids, np.int32), offsets])
        if start:
            joint = _joint(found, more)
            if joint is None:
                return encode(text)
            found, more = found[: joint[0]], more[joint[1] :]
        found = np.concatenate([found, more])
    return LongEncoding(found[:, 0].copy(), found[:, 1:].copy())


def _joint(one: NDArray[np.int32], other: NDArray[np.int32]) -> tuple[int, int] | None:
    """Where two lists of tokens may be joined: the middle of a row of tokens that they have in common."""
    begin = int(other[0, 1]) if len(other) else 0
    first, last = np.searchsorted(one[:, 1], [begin + OVERLAP // 4, begin + OVERLAP * 3 // 4]).tolist()
    for place in range(first, last - AGREED, AGREED):
        there = int(np.searchsorted(other[:, 1], one[place, 1]))
        if np.array_equal(one[place : place + AGREED], other[there : there + AGREED]):
            return place + AGREED // 2, there + AGREED // 2
    return None
