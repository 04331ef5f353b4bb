"""Regular expressions of a configuration, searched for in bounded time: some have no end on some texts."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

from holdfast.errors import ConfigError

LONGEST = 1.0
"""Seconds of computing that one search may take. Searches that end take microseconds."""

LARGEST = 100_000
"""Parts that an expression may have, with its counted repetitions written out."""

_TOKEN = re.compile(
    r"\\.|\[\^?\]?(?:\\.|[^\\\]])*\]|(?P<open>\()|(?P<close>\))|\{(?P<least>\d*),?(?P<most>\d*)\}|.",
    re.DOTALL,
)


def check_pattern(pattern: str) -> None:
    """Check that a regular expression can be used and has exactly one group.

    Raises:
        ValueError: it is none, has other groups, or is too large with its repetitions written out.
    """
    size = _size(pattern)
    if size > LARGEST:
        raise ValueError(f"{pattern!r:.200} has {size:.0e} parts with its repetitions written out; {LARGEST:,} at most")
    try:
        groups = {re.compile(pattern).groups, _compiled(pattern).groups}
    except Exception as error:  # re.error, OverflowError, RecursionError, and what the package regex raises
        raise ValueError(f"{pattern!r:.200} is no regular expression: {error}") from None
    if groups != {1}:
        raise ValueError(f"{pattern!r:.200} must have exactly one group, around what the prompt is about")


def group_span(pattern: str, text: str) -> tuple[int, int] | None:
    """Where group 1 of the first match lies in a text; None if there is no match.

    Raises:
        ConfigError: the search has no end within :data:`LONGEST` seconds.
    """
    try:
        found = _compiled(pattern).search(text, timeout=LONGEST)
    except TimeoutError:
        raise ConfigError(
            f"input: {pattern!r:.200} finds no end on a prompt of {len(text)} characters ({text!r:.60}): a repetition "
            "within a repetition, as in (a+)+, may take time without bound; say it without"
        ) from None
    return None if found is None else found.span(1)


@lru_cache
def _compiled(pattern: str) -> Any:
    import regex  # type: ignore[import-untyped]  # as re, with a limit of time

    return regex.compile(pattern)


def _size(pattern: str) -> float:
    """The parts of an expression with its counted repetitions written out, as engines may do."""
    open_groups, last = [0.0], 0.0
    for token in _TOKEN.finditer(pattern):
        if token["open"]:
            open_groups.append(0.0)
            last = 0.0
            continue
        if token["close"]:
            last = 1 + open_groups.pop() if len(open_groups) > 1 else 1.0
        elif token["least"] or token["most"]:
            times = float((token["most"] or token["least"])[:12])
            open_groups[-1] += last * max(0.0, times - 1)
            last *= max(1.0, times)
            continue
        else:
            last = 1.0
        open_groups[-1] += last
    return sum(open_groups)
