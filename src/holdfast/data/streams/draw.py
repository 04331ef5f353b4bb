"""Random choices of the streams that are made: the same on every platform and Python version."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Sequence
from typing import TypeVar

Thing = TypeVar("Thing")


class Draw:
    """Random choices for one purpose: all come from ``Random.random()``.

    Args:
        version: of the stream, for example "chronicle 1".
        seed: of its world.
        purpose: choices for another purpose are others.
    """

    def __init__(self, version: str, seed: int, purpose: str):
        digest = hashlib.sha256(f"{version}/{seed}/{purpose}".encode()).digest()
        self._random = random.Random(int.from_bytes(digest[:8], "big"))

    def index(self, n: int) -> int:
        return int(self._random.random() * n)

    def choice(self, things: Sequence[Thing]) -> Thing:
        return things[self.index(len(things))]

    def shuffled(self, things: Iterable[Thing]) -> list[Thing]:
        rest = list(things)
        return [rest.pop(self.index(len(rest))) for _ in range(len(rest))]
