"""A task: named train, eval and test examples and a metric; a stream of tasks; measures of general ability."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Self

from holdfast.models.pictures import Picture

Kind = Literal["sft", "dpo", "kto", "grpo"]
"""How the stage of a task is trained: on answers, on pairs of a better and a worse answer, on answers that are good or
bad, or on answers that the model writes and that are rewarded."""


PICTURE = "\ufdd2"
"""Stands in a turn's content where a picture is shown: a noncharacter, which text does not hold."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One message of a conversation.

    Attributes:
        cut: the span [start, end) of ``content`` that truncation may shorten from its middle: the input, never the
            instruction or an answer. None: nothing may be cut.
        trained: whether the loss counts this answer.
        reasoning: what the assistant thought before this answer.
        calls: the assistant's calls of tools, each as the JSON of an object with ``name`` and ``arguments``.
        name: of the tool that says this.
        pictures: what it shows, in the places of :data:`PICTURE` in its content.
    """

    role: Literal["system", "user", "assistant", "tool"]
    content: str
    cut: tuple[int, int] | None = None
    trained: bool = True
    reasoning: str | None = None
    calls: tuple[str, ...] = ()
    name: str | None = None
    pictures: tuple[Picture, ...] = ()

    @property
    def said(self) -> str:
        """Its content, with <image> for each picture, and its calls, on lines of their own."""
        content = readable_text(self.content)
        return "\n".join(filter(None, (content, *self.calls))) if self.calls else content

    @property
    def shown(self) -> list[int]:
        """The numbers of the pictures that it shows, which tell it from a turn with the same words."""
        return [picture.number for picture in self.pictures]


@dataclass(frozen=True, slots=True)
class Example:
    """One row: a conversation that ends with the assistant's answer, or plain text.

    Attributes:
        file: the file that the row came from.
        row: its number there, from 0.
        turns: the conversation; of ``turns`` and ``text``, exactly one is given.
        text: plain text.
        number: which of a conversation's answers is asked for, from 0, if each of them is.
        choices: the answers that the question offers.
        also_right: answers that are as good as the one given.
        tools: the tools that the assistant may call, as the JSON of a list in the form that chat templates read.
        good: whether the answer is good, of a row that says so (kto).
        columns: all columns of a row whose answers are rewarded (grpo), for its reward.
        answered: False where the row has no answer of its own, so that the last turn only holds its place.
    """

    file: str
    row: int
    turns: tuple[Turn, ...] = ()
    text: str | None = None
    number: int | None = None
    choices: tuple[str, ...] = ()
    also_right: tuple[str, ...] = ()
    tools: str | None = None
    good: bool | None = None
    columns: Mapping[str, Any] | None = None
    answered: bool = True

    @property
    def answer(self) -> str:
        """The right response: the last assistant turn, its calls of tools included; empty where there is none."""
        return self.turns[-1].said if self.turns and self.answered else ""

    @property
    def question(self) -> str:
        """Everything before the answer, for people to read."""
        return "\n".join(turn.said for turn in self.turns[:-1])

    @property
    def input(self) -> str:
        """The question without its instruction: the span of it that may be cut, or all of it."""
        question = next((turn for turn in reversed(self.turns) if turn.role == "user"), None)
        if question is None or question.cut is None:
            return self.question
        return readable_text(question.content[slice(*question.cut)])

    @property
    def pictures(self) -> list[Picture]:
        """What its turns show, in order."""
        return [picture for turn in self.turns for picture in turn.pictures]


def readable_text(content: str) -> str:
    """A turn's content for people, with <image> for each picture."""
    return content.replace(PICTURE, "<image>")


@dataclass
class Counts:
    """Counts of suspicious rows of a task; `holdfast check` and the report show them.

    A row is a duplicate if an earlier row has the same prompt and answer, and contradicts if an earlier row has the
    same prompt and another answer. ``test_rows_in_other_tasks`` are questions that another task of the stream trains
    on.
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
        labels: all possible answers, if they are known.
        kind: how its stage is trained.
        options: of the trainer of its kind.
        reward: of answers that the model writes (grpo): exact_match, or module:function.
        beside: further metrics of the same test examples.
        asked: how a row becomes a prompt: the prompt with {sentence} in its place, or the name of the rows' format.
        max_new_tokens: longest response that the task allows, in tokens.
        fingerprint: SHA-256 over all its examples, in order.
        notes: what `holdfast check` and a run say about how its rows were read.
        gone: of a task whose rows are not kept, how many it had to train and to test.
    """

    name: str
    metric: str
    train: Sequence[Example]
    test: list[Example]
    eval: Sequence[Example] = field(default_factory=list)
    labels: list[str] | None = None
    beside: list[str] = field(default_factory=list)
    asked: str = ""
    max_new_tokens: int | None = None
    fingerprint: str = ""
    counts: Counts = field(default_factory=Counts)
    notes: list[str] = field(default_factory=list)
    gone: tuple[int, int] | None = None
    kind: Kind = "sft"
    options: dict[str, Any] = field(default_factory=dict)
    reward: str | None = None


def fingerprint(train: Sequence[Example], eval_: Sequence[Example], test: Sequence[Example]) -> str:
    """The :class:`Fingerprint` of three splits."""
    return Fingerprint().add(train).add(eval_).add(test).hexadecimal


class Fingerprint:
    """SHA-256 over the content of splits, in order; files and row numbers do not count."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()
        self._before = "["  # one JSON text, row by row

    def passing(self, split: Iterable[Example]) -> Iterator[Example]:
        """The examples of the next split, which are taken in as they pass; all must."""
        self._digest.update(f"{self._before}[".encode())
        before = ""
        for example in split:
            self._digest.update(f"{before}{json.dumps(_content(example))}".encode())
            before = ", "
            yield example
        self._digest.update(b"]")
        self._before = ", "

    def add(self, split: Iterable[Example]) -> Self:
        """Take in the next split."""
        for _ in self.passing(split):
            pass
        return self

    def copy(self) -> Self:
        """Another one of the same splits."""
        other = type(self)()
        other._digest, other._before = self._digest.copy(), self._before
        return other

    @property
    def hexadecimal(self) -> str:
        """The digest of the splits so far."""
        digest = self._digest.copy()
        digest.update(b"]")
        return digest.hexdigest()


def _content(row: Example) -> object:
    if row.text is not None:
        return row.text
    turns = [_said(turn) for turn in row.turns]
    if row.good is not None or row.columns is not None:
        return [turns, row.choices, row.tools, row.good, row.columns]
    if row.tools is not None:
        return [turns, row.choices, row.also_right, row.tools]
    return [turns, row.choices, row.also_right] if row.choices or row.also_right else turns


def _said(turn: Turn) -> tuple[object, ...]:
    """What a turn means; of one without reasoning, calls and marks role and content, as it has always been."""
    more = (turn.trained, turn.reasoning, turn.calls, turn.name)
    said = (turn.role, turn.content) if more == (True, None, (), None) else (turn.role, turn.content, *more)
    return (*said, turn.shown) if turn.pictures else said


@dataclass(frozen=True)
class HarnessTask:
    """A task of lm-evaluation-harness, and how the library is to measure it; None: as the task says itself.

    Attributes:
        task: its name, or that of a group or tag.
        tasks: the names that the configuration asks for together.
        include_path: folder of the user's task definitions.
        metric: one of the task's metrics; None: its first.
    """

    task: str
    tasks: tuple[str, ...]
    include_path: str | None = None
    num_fewshot: int | None = None
    limit: float | None = None
    apply_chat_template: bool = False
    metric: str | None = None


@dataclass
class General:
    """A measure of general ability: texts (perplexity), questions with choices (accuracy), prompts (refusals), or a
    task of lm-evaluation-harness.

    Attributes:
        texts: the texts of a perplexity, or the prompts of a measure of refusals.
        rows: in the place of texts, rows of ``input_ids`` and ``labels``: samples that a model wrote.
        questions: (question, choices, index of the right choice).
        shown: for each question the pieces of text that stand before it, or empty; the last ones are left out if they
            do not fit.
        pictures: what each question shows, and the pieces before it, in the places of :data:`PICTURE` in them; empty
            where none shows anything.
        by: what is compared: the whole choices without (acc) or with (acc_with_end) the tokens that end an answer, the
            former divided by the choice's characters (acc_norm) or UTF-8 bytes (acc_bytes), or, where the choices are
            letters, only the token in which they differ.
        max_new_tokens: longest response to a prompt, in tokens.
        harness: the task of the library.
    """

    name: str
    kind: Literal["perplexity", "choices", "refusals", "lm_eval"]
    texts: list[str] = field(default_factory=list)
    questions: list[tuple[str, list[str], int]] = field(default_factory=list)
    pictures: list[tuple[Picture, ...]] = field(default_factory=list)
    shown: list[list[str]] = field(default_factory=list)
    by: Literal["acc", "acc_norm", "acc_bytes", "acc_with_end", "letter"] = "acc"
    max_new_tokens: int = 64
    harness: HarnessTask | None = None
    rows: list[dict[str, list[int]]] = field(default_factory=list)


@dataclass
class Stream:
    """Tasks in the order in which they are learned.

    Attributes:
        general: the stream's own measures of general ability.
        version: of its definition: a benchmark's number, and a digest of prompts, metrics and order, not of the rows.
    """

    name: str
    tasks: list[Task]
    general: list[General] = field(default_factory=list)
    version: str = ""
