"""What is noticed of examples while they become tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from holdfast.api.task import Example

Origin = tuple[str, int]
"""The file of an example, and its row there, from 0."""


@dataclass
class Tally:
    """Counts of examples that were encoded.

    Attributes:
        shortened: those that were shortened.
        cut: those among them that lost a part of the answer.
        longest: tokens of the longest last answer with its end, before anything is cut.
    """

    shortened: set[Origin] = field(default_factory=set)
    cut: set[Origin] = field(default_factory=set)
    longest: int = 0

    def add(self, other: Tally) -> None:
        """Count what another tally counts, too."""
        self.shortened |= other.shortened
        self.cut |= other.cut
        self.longest = max(self.longest, other.longest)


class Seen(NamedTuple):
    """What warnings are about, of some examples.

    Attributes:
        conversations: those that are no texts.
        several: those among them of several turns.
        signs: those that spell a special token, which is read as letters.
        sign: the first of these tokens; empty where there is none.
    """

    conversations: int = 0
    several: int = 0
    signs: int = 0
    sign: str = ""

    @classmethod
    def of(cls, examples: Iterable[Example], sign_of: Callable[[Example], str | None]) -> Seen:
        """Look at examples, one by one.

        Args:
            sign_of: :meth:`.Encoder.sign_as_text`.
        """
        turns: list[int] = []
        signs: list[str] = []
        for example in examples:
            if example.text is None:
                turns.append(len(example.turns))
            if sign := sign_of(example):
                signs.append(sign)
        return cls(len(turns), sum(count > 2 for count in turns), len(signs), signs[0] if signs else "")

    def and_then(self, other: Seen) -> Seen:
        """What was seen of these examples, and of others after them."""
        return Seen(
            self.conversations + other.conversations,
            self.several + other.several,
            self.signs + other.signs,
            self.sign or other.sign,
        )


NOTHING_SEEN = Seen()
