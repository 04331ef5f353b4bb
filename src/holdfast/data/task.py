"""What a task is: named train, eval and test examples and a metric."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class Turn:
    """One message of a conversation.

    ``cut`` is the span [start, end) of ``content`` that truncation may shorten, from its middle: the input, never
    the instruction or an answer. None: nothing may be cut.
    """

    role: Literal["system", "user", "assistant"]
    content: str
    cut: tuple[int, int] | None = None


@dataclass(frozen=True)
class Example:
    """One row: a conversation that ends with the assistant's answer, or plain text.

    Exactly one of ``turns`` and ``text`` is given. ``file`` and ``row`` (0-based) say where it came from.
    """

    file: str
    row: int
    turns: tuple[Turn, ...] = ()
    text: str | None = None

    @property
    def answer(self) -> str:
        """What the model should respond: the last assistant turn; empty for plain text."""
        return self.turns[-1].content if self.turns else ""

    @property
    def question(self) -> str:
        """Everything before the answer, for people to read."""
        return "\n".join(turn.content for turn in self.turns[:-1])


@dataclass
class Counts:
    """What was noticed while a task was loaded; `holdfast check` and the report show it."""

    duplicate_train_rows: int = 0
    test_rows_in_train: int = 0
    dropped_train_rows: int = 0


@dataclass
class Task:
    """A named dataset with a metric. ``fingerprint`` is a SHA-256 over all its examples, in order."""

    name: str
    metric: str
    train: list[Example]
    test: list[Example]
    eval: list[Example] = field(default_factory=list)
    labels: list[str] | None = None
    fingerprint: str = ""
    counts: Counts = field(default_factory=Counts)


def fingerprint(train: Sequence[Example], eval_: Sequence[Example], test: Sequence[Example]) -> str:
    """SHA-256 (hexadecimal) over what the examples of the three splits say, in order, not over where they came from."""
    splits = [
        [row.text if row.text is not None else [(turn.role, turn.content) for turn in row.turns] for row in split]
        for split in (train, eval_, test)
    ]
    return hashlib.sha256(json.dumps(splits, ensure_ascii=True).encode()).hexdigest()


@dataclass
class General:
    """A measure of general ability: texts (perplexity) or questions with choices (accuracy).

    ``questions`` are (question, choices, index of the right choice).
    """

    name: str
    kind: Literal["perplexity", "choices"]
    texts: list[str] = field(default_factory=list)
    questions: list[tuple[str, list[str], int]] = field(default_factory=list)


@dataclass
class Stream:
    """Tasks in the order in which they are learned, and the stream's own measures of general ability."""

    name: str
    tasks: list[Task]
    general: list[General] = field(default_factory=list)
