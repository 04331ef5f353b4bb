"""Whether choices are picked better than by guessing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict


class Chance(TypedDict):
    """How the answers to questions with choices compare with guesses.

    Attributes:
        level: the share of right answers that needs no knowledge.
        questions: how many were asked.
        interval: [low, high], the 95 % interval of the share of right answers.
        at_chance: whether it is not above ``level``: the interval holds it, or lies below it.
    """

    level: float
    questions: int
    interval: list[float]
    at_chance: bool


def chance_level(choices: Sequence[int]) -> float:
    """The share of right answers that guessing gives.

    Args:
        choices: of each question, how many choices it has.
    """
    return sum(1 / count for count in choices) / len(choices)


def against_chance(right: int, questions: int, level: float) -> Chance:
    """Compare right answers with guesses.

    Whoever guesses is said to be above chance in at most 2.5 % of cases, however few the questions are.

    Args:
        right: answers, of ``questions``.
        level: the share of right answers that needs no knowledge, such as :func:`chance_level`.
    """
    low, high = exact_interval(right, questions)
    return {"level": level, "questions": questions, "interval": [low, high], "at_chance": low <= level}


def exact_interval(right: int, questions: int) -> tuple[float, float]:
    """The 95 % interval of a share (Clopper and Pearson 1934, Biometrika 26): its ends are the shares of which as many
    right answers or more, or as many or fewer, have a probability of 2.5 %."""
    from scipy.special import betaincinv

    low = betaincinv(right, questions - right + 1, 0.025) if right else 0.0
    high = betaincinv(right + 1, questions - right, 0.975) if right < questions else 1.0
    return float(low), float(high)
