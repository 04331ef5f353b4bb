"""Which metric fits a task: that follows from its answers."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from holdfast.api.task import Example

CLOSED_LENGTH = 60
"""Characters of the longest answer of a closed task."""
CLOSED_COUNT = 50
"""Different answers of a closed task at most."""
CLOSED_ROWS = 3
"""Rows for each different answer of a closed task, at least, on average."""
SHORT = 30
"""Characters of an answer, in the median, up to which exact match says something of open answers too."""
INSTRUCTION = 12
"""Characters that all prompts begin or end with, at least, where something in them says what is asked."""


@dataclass(frozen=True)
class Fitting:
    """The metrics of a task, and why.

    Attributes:
        beside: further metrics.
        labels: all answers, where they are closed.
    """

    metric: str
    why: str
    beside: list[str] = field(default_factory=list)
    labels: list[str] | None = None


def fitting(examples: Sequence[Example], labels: list[str] | None = None, metric: str | None = None) -> Fitting:
    """The metric that fits the answers of a task, or the one that is wanted.

    Closed answers (few different ones, all short) are scored by accuracy. Open ones are scored by their loss per token,
    with ROUGE-L beside it and, where they are short, accuracy.

    Args:
        examples: all of the task's.
        labels: the answers that there may be, if they are known.
        metric: decides otherwise.
    """
    if any(example.text is not None for example in examples):
        return Fitting(metric or "loss", "texts have no answers")
    answers = [example.answer for example in examples]
    distinct = sorted(set(answers))
    longest = max(map(len, answers))
    closed = labels is not None or (
        len(distinct) <= CLOSED_COUNT
        and CLOSED_ROWS * len(distinct) <= len(answers)
        and longest <= CLOSED_LENGTH
        and not any("\n" in answer for answer in distinct)
    )
    if closed and labels is None:
        labels = distinct
    if metric is not None:
        return Fitting(metric, "as you chose", labels=labels)
    if closed:
        assert labels is not None
        return Fitting("accuracy", f"the answers are closed: {len(labels)} different ones, all short", [], labels)
    short = statistics.median(map(len, answers)) <= SHORT
    why = f"the answers are open: {len(distinct)} different ones in {len(answers)} rows, {longest} characters at most"
    return Fitting("loss", why, ["rouge_l", *["accuracy"] * short])


def asks_nothing(examples: Sequence[Example]) -> bool:
    """Whether nothing that all prompts have in common says what is asked: the text alone is there, and its label is the
    answer."""
    prompts = [example.question for example in examples]
    return max(_shared(prompts), _shared([prompt[::-1] for prompt in prompts])) < INSTRUCTION


def _shared(texts: Sequence[str]) -> int:
    """Characters that all texts begin with."""
    first, last = min(texts), max(texts)
    pairs = enumerate(zip(first, last, strict=False))
    return next((place for place, (one, other) in pairs if one != other), min(len(first), len(last)))
