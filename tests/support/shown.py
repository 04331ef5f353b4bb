"""What long work shows of its progress."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from holdfast.system.progress import Show


def recorded() -> tuple[Show, list[tuple[str, int, int]]]:
    """What may stand for a stage's ``show``, and what it was told: title, steps done, all steps."""
    told: list[tuple[str, int, int]] = []

    @contextmanager
    def show(title: str) -> Iterator[Callable[[int, int], None]]:
        yield lambda done, total: told.append((title, done, total))

    return show, told
