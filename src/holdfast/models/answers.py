"""Answers kept as they come, so that an evaluation that was killed, or whose server died, asks only the rest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from holdfast.system.files import append_jsonl, cut_torn_line, is_finite, read_appended

Question = Any
"""What is asked, as plain JSON values: all that the answer depends on but the model."""
Answer = Any
Add = Callable[[Sequence[int], Sequence[Answer]], None]


class AnswerCache:
    """Answers of one model by what was asked, in a JSON-lines file; a line holds those that came together.

    A question is known by its digest, so that one that has changed since is asked anew. Greedy answers depend on
    nothing else, so that a question that comes twice is asked once. A last line that a kill left torn is dropped. An
    answer that is not finite, which JSON cannot hold, is kept in memory alone.

    Args:
        path: the file, which need not exist; where None, answers are kept in memory alone.
        writes: whether this process writes the file; others only read what stood there.
    """

    def __init__(self, path: Path | None = None, *, writes: bool = True):
        self.path, self._writes = path, writes
        self._answers: dict[str, Answer] = {}
        if path is not None and path.exists():
            for line in read_appended(path):
                self._answers |= line
            if writes:
                cut_torn_line(path)

    def complete(self, asked: Sequence[Question], ask: Callable[[list[int], Add], None]) -> list[Answer]:
        """The answer to each question.

        Args:
            ask: is given the numbers of the questions that have none, unless all have, and a function that keeps the
                answers to some of them; it must keep all, as soon as they are there.
        """
        digests = [_digest(question) for question in asked]
        left = {digest: i for i, digest in reversed([*enumerate(digests)]) if digest not in self._answers}
        if left:
            ask(sorted(left.values()), lambda numbers, answers: self._add([digests[i] for i in numbers], answers))
        return [self._answers[digest] for digest in digests]

    def find(self, question: Question) -> Answer:
        """The answer to a question, or None."""
        return self._answers.get(_digest(question))

    def add(self, question: Question, answer: Answer) -> None:
        """Keep one answer."""
        self._add([_digest(question)], [answer])

    def _add(self, digests: Sequence[str], answers: Sequence[Answer]) -> None:
        new = dict(zip(digests, answers, strict=True))
        self._answers |= new
        if self.path is None or not self._writes:
            return
        if lasting := {digest: answer for digest, answer in new.items() if is_finite(answer)}:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            append_jsonl(self.path, lasting)

    def remove(self) -> None:
        """Delete the file: what was made of the answers is written."""
        if self.path is not None and self._writes:
            self.path.unlink(missing_ok=True)


def _digest(question: Question) -> str:
    return hashlib.blake2b(json.dumps(question).encode(), digest_size=16).hexdigest()
