"""Preferences: whether the better answer is the likelier one, and how likely good and bad answers are."""

from __future__ import annotations

import math
from collections.abc import Sequence

from holdfast.api.scorer import Record, Scorer
from holdfast.api.task import Example


class Preference(Scorer):
    """1 if the chosen answer is likelier than the rejected one, otherwise 0, also if both are equally likely.

    An answer's likelihood is the sum of the log-probabilities of its tokens and of those that end it, as in DPO's
    implicit reward (Rafailov et al., 2023, arXiv 2305.18290, section 4), here without the reference's.
    """

    reads = "choices"

    def row(self, record: Record) -> float:
        chosen, *others = record["choice_nats"]
        return float(all(chosen < other for other in others))

    def refusal(self, example: Example, labels: Sequence[str] | None) -> str | None:
        if len(example.choices) < 2 or example.choices[0] != example.answer:
            return "it is no pair of a chosen and a rejected answer"
        return None


class JudgedLikelihood(Scorer):
    """p of a good answer and 1 - p of a bad one, with p the geometric mean of the probabilities of its tokens."""

    reads = "loss"

    def row(self, record: Record) -> float:
        p = math.exp(-record["nats"] / record["tokens"])
        return p if record["good"] else 1 - p

    def refusal(self, example: Example, labels: Sequence[str] | None) -> str | None:
        return "no label says whether its answer is good" if example.good is None else None


SCORERS = [
    Preference("preference", about="the chosen answer is likelier than the rejected one, by sums of log-probabilities"),
    JudgedLikelihood("judged_likelihood", about="of good answers their probability a token, of bad ones 1 less it"),
]
