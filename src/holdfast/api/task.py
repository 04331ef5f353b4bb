"""What a task is: named train, eval and test examples and a metric."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal


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

    Exactly one of ``turns`` and ``text`` is given. ``file`` and ``row`` (0-based) say where it came from, and
    ``number`` (0-based) which of a conversation's answers is asked for, where each is. ``choices`` are the answers that
    the question offers, and ``also_right`` answers that are as good as the one given.
    """

    file: str
    row: int
    turns: tuple[Turn, ...] = ()
    text: str | None = None
    number: int | None = None
    choices: tuple[str, ...] = ()
    also_right: tuple[str, ...] = ()

    @property
    def answer(self) -> str:
        """What the model should respond: the last assistant turn; empty for plain text."""
        return self.turns[-1].content if self.turns else ""

    @property
    def question(self) -> str:
        """Everything before the answer, for people to read."""
        return "\n".join(turn.content for turn in self.turns[:-1])

    @property
    def input(self) -> str:
        """What the question is about, without its instruction: the span of it that may be cut, or all of it."""
        asked = next((turn for turn in reversed(self.turns) if turn.role == "user"), None)
        if asked is None or asked.cut is None:
            return self.question
        return asked.content[slice(*asked.cut)]


@dataclass
class Counts:
    """What was noticed while a task was loaded; `holdfast check` and the report show it.

    A row is a duplicate where prompt and answer stood before, and contradicts where the prompt stood before with
    another answer. ``test_rows_in_other_tasks`` are questions that another task of the stream trains on.
    """

    duplicate_train_rows: int = 0
    contradicting_train_rows: int = 0
    duplicate_test_rows: int = 0
    test_rows_in_train: int = 0
    test_rows_in_other_tasks: int = 0
    dropped_train_rows: int = 0


@dataclass
class Task:
    """A named dataset with a metric.

    Attributes:
        beside: further metrics of the same responses.
        labels: every answer there may be, where that is known.
        asked: how a row becomes a prompt: the prompt with {sentence} in its place, or the name of the rows' format.
        max_new_tokens: longest response that the task allows.
        fingerprint: SHA-256 over all its examples, in order.
    """

    name: str
    metric: str
    train: list[Example]
    test: list[Example]
    eval: list[Example] = field(default_factory=list)
    labels: list[str] | None = None
    beside: list[str] = field(default_factory=list)
    asked: str = ""
    max_new_tokens: int | None = None
    fingerprint: str = ""
    counts: Counts = field(default_factory=Counts)


def fingerprint(train: Sequence[Example], eval_: Sequence[Example], test: Sequence[Example]) -> str:
    """SHA-256 (hexadecimal) over what the examples of the three splits say, in order, not over where they came from."""
    splits = [[_said(row) for row in split] for split in (train, eval_, test)]
    return hashlib.sha256(json.dumps(splits, ensure_ascii=True).encode()).hexdigest()


def _said(row: Example) -> object:
    if row.text is not None:
        return row.text
    turns = [(turn.role, turn.content) for turn in row.turns]
    return [turns, row.choices, row.also_right] if row.choices or row.also_right else turns


@dataclass
class General:
    """A measure of general ability: texts (perplexity), questions with choices (accuracy), prompts (refusals), or a
    task of lm-evaluation-harness.

    ``questions`` are (question, choices, index of the right choice). ``shown`` holds for each question the pieces of
    text that stand before it, or is empty; of pieces that do not fit the last ones are left out. ``by``: the whole
    choices are compared, or only the token in which they, as letters, differ. ``texts`` are also the prompts, whose
    responses have ``max_new_tokens`` at most. ``harness`` are the options of the configuration that the library takes,
    and ``task``, one of theirs.
    """

    name: str
    kind: Literal["perplexity", "choices", "refusals", "lm_eval"]
    texts: list[str] = field(default_factory=list)
    questions: list[tuple[str, list[str], int]] = field(default_factory=list)
    shown: list[list[str]] = field(default_factory=list)
    by: Literal["answer", "letter"] = "answer"
    max_new_tokens: int = 64
    harness: dict[str, Any] = field(default_factory=dict)


@dataclass
class Stream:
    """Tasks in the order in which they are learned.

    Attributes:
        general: the stream's own measures of general ability.
        version: of its definition: a benchmark's number, and a digest of prompts, metrics and order, whatever the rows.
    """

    name: str
    tasks: list[Task]
    general: list[General] = field(default_factory=list)
    version: str = ""
