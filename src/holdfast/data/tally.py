"""What is noticed of examples while they become tokens."""

from __future__ import annotations

from dataclasses import dataclass, field

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
