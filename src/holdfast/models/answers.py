"""Answers saved as they come, so that an evaluation continues after a kill without asking again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from holdfast.errors import RunDirectoryError
from holdfast.system.files import append_jsonl, cut_torn_line, is_finite, read_appended

Question = Any
"""A question as plain JSON values: all that the answer depends on, except the model."""
Answer = Any
Add = Callable[[Sequence[int], Sequence[Answer]], None]


CHECK = "check"
"""In a line of the file, the digest of the answers beside it."""


class AnswerCache:
    """The answers of one model by question, in a JSON-lines file; a line holds the answers that came together.

    The key is the question's digest, so a changed question is asked again. Greedy answers depend on nothing else, so a
    repeated question is asked once. A last line that a kill cut off is dropped. An
    answer that is not finite, which JSON cannot hold, stays in memory.

    Args:
        path: the file, which need not exist; None: answers stay in memory.
        writes: whether this process writes the file; other processes only read what it held.
    """

    def __init__(self, path: Path | None = None, *, writes: bool = True):
        self.path, self._writes = path, writes
        self._answers: dict[str, Answer] = {}
        if path is not None and path.exists():
            for number, line in enumerate(read_appended(path), start=1):
                known = line.pop(CHECK, None)  # version 0.1.0 wrote none
                if known is not None and known != _digest(line):
                    raise RunDirectoryError(
                        f"{path}: line {number} is damaged; delete the file, and the answers in it are asked again"
                    )
                self._answers |= line
            if writes:
                cut_torn_line(path)

    def complete(self, questions: Sequence[Question], ask: Callable[[list[int], Add], None]) -> list[Answer]:
        """The answer to each question.

        Args:
            ask: called with the numbers of the questions without an answer, if there are any, and with a function that
                saves the answers to some of them; it must save every answer as soon as it is there.
        """
        digests = [_digest(question) for question in questions]
        left = {digest: i for i, digest in reversed([*enumerate(digests)]) if digest not in self._answers}
        if left:
            ask(sorted(left.values()), lambda numbers, answers: self._add([digests[i] for i in numbers], answers))
        return [self._answers[digest] for digest in digests]

    def find(self, question: Question) -> Answer:
        """The answer to a question, or None."""
        return self._answers.get(_digest(question))

    def add(self, question: Question, answer: Answer) -> None:
        """Save one answer."""
        self._add([_digest(question)], [answer])

    def _add(self, digests: Sequence[str], answers: Sequence[Answer]) -> None:
        new = dict(zip(digests, answers, strict=True))
        self._answers |= new
        if self.path is None or not self._writes:
            return
        if lasting := {digest: answer for digest, answer in new.items() if is_finite(answer)}:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            append_jsonl(self.path, lasting | {CHECK: _digest(lasting)})

    def remove(self) -> None:
        """Delete the file, once the results are written."""
        if self.path is not None and self._writes:
            self.path.unlink(missing_ok=True)


def _digest(question: Question) -> str:
    return hashlib.blake2b(json.dumps(question).encode(), digest_size=16).hexdigest()
