"""Multiple choice: by the letter that was generated, or by the likelihood of each choice."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from holdfast.api.scorer import Record, Scorer
from holdfast.api.task import Example

_OPENING = r"[\s\"'`(\[{<*]*"
_CLOSING = r"[\"'`)\]}>*]*"
_FIRST = re.compile(rf"{_OPENING}([A-Za-z]){_CLOSING}(?:\s*$|[.:)\]、。](?:\s|$)|[)\]}}>](?:\s|$)|\s+[-–—]\s)")
_STATED = re.compile(rf"(?:\b[Aa]nswer(?:\s+is)?|答案(?:是|为)?)\s*:?\s*{_OPENING}([A-Z]){_CLOSING}(?![^\W_])")


def choice_letter(response: str, answer: str) -> float:
    """1 if the response chooses the letter that the answer begins with, otherwise 0; see :func:`letter`."""
    chosen = letter(response)
    return float(chosen is not None and chosen == letter(answer))


def letter(text: str) -> str | None:
    """The letter that a response to a question with lettered choices chooses, as a capital; None if it chooses none.

    Either the first line begins with a letter that stands alone: nothing but quotation marks, brackets and asterisks
    around it, and then the end of the line, a full stop, colon or bracket, or a dash. "B", "b.", "(B) a poem",
    "**B**" and "B: since" are B; "Because", "A dog barks", "B or C" and "A, B" are none. Or the text says
    "answer: B", "answer is B" or the same in Chinese, with a capital letter; the first time counts. A letter anywhere
    else in a sentence chooses nothing. Full-width letters and signs count as plain ones.
    """
    text = unicodedata.normalize("NFKC", text).strip()
    match = _FIRST.match(text.split("\n", 1)[0]) or _STATED.search(text)
    return match.group(1).upper() if match else None


class ChoiceLetter(Scorer):
    def refusal(self, example: Example, labels: Sequence[str] | None) -> str | None:
        if letter(example.answer) is None:
            return f"the answer {example.answer!r:.60} begins with no letter of a choice"
        return None


class ChoiceLikelihood(Scorer):
    """1 if the right choice is the likeliest, otherwise 0; of equally likely ones the first counts.

    The likelihood of a choice is the sum of the log-probabilities of its tokens in the place of the answer, without
    the tokens that end an answer (``acc`` of lm-evaluation-harness) or with them, or their mean with them (as RealTime
    QA does it).
    """

    reads = "choices"

    def __init__(self, name: str, about: str, *, mean: bool = False, end: bool = True):
        super().__init__(name, about=about)
        self._mean, self.counts_end = mean, end

    def row(self, record: Record) -> float:
        return float(record["choices"][self.choose(record)] == record["answer"])

    def choose(self, record: Record) -> int:
        if not self._mean:
            return super().choose(record)
        pairs = zip(record["choice_nats"], record["choice_tokens"], strict=True)
        losses = [nats / tokens for nats, tokens in pairs]
        return losses.index(min(losses))

    def refusal(self, example: Example, labels: Sequence[str] | None) -> str | None:
        choices = example.choices or labels
        if not choices:
            return "it offers no choices; give the task labels, the answers that there may be"
        if example.answer not in choices:
            return f"the answer {example.answer!r:.60} is none of the choices: {', '.join(choices)}"
        return None


SCORERS = [
    ChoiceLetter("choice_letter", choice_letter, "the letter that stands first and alone, or after 'answer is'"),
    ChoiceLikelihood("choice_acc", "the choice with the greatest log-likelihood (lm-eval's acc)", end=False),
    ChoiceLikelihood("choice_likelihood", "the choice that is likeliest with the end of the answer after it"),
    ChoiceLikelihood("choice_likelihood_mean", "the same, by log-likelihood per token", mean=True),
]
