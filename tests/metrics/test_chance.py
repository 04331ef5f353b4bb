"""Whether choices are picked better than by guessing."""

from __future__ import annotations

import math

import numpy as np
import pytest

from holdfast.metrics.chance import against_chance, chance_level, exact_interval


def tail(right: int, questions: int, share: float) -> float:
    """By hand: the probability of that many right answers or more."""
    return sum(math.comb(questions, k) * share**k * (1 - share) ** (questions - k) for k in range(right, questions + 1))


@pytest.mark.parametrize(("right", "questions"), [(0, 1), (1, 1), (3, 7), (26, 100), (55, 100), (99, 100)])
def test_the_ends_leave_two_and_a_half_percent_beyond_them(right: int, questions: int):
    low, high = exact_interval(right, questions)
    assert low <= right / questions <= high
    assert low == 0 if right == 0 else tail(right, questions, low) == pytest.approx(0.025)
    assert high == 1 if right == questions else 1 - tail(right + 1, questions, high) == pytest.approx(0.025)


@pytest.mark.parametrize("choices", [[4], [2, 2, 2], [4] * 10, [2] * 60, [4] * 100, [2, 3, 4, 5] * 30])
def test_who_guesses_is_at_chance(choices: list[int]):
    """Guesses stand at chance in at least 97.5 % of 4000 cases; 0.9 % are four standard errors."""
    level = chance_level(choices)
    guesses = np.random.default_rng(0).random((4000, len(choices))) < 1 / np.array(choices)
    said = {k: against_chance(k, len(choices), level)["at_chance"] for k in range(len(choices) + 1)}
    assert np.mean([said[k] for k in guesses.sum(axis=1)]) >= 0.975 - 0.009


def test_what_is_known_is_above_chance_and_what_is_worse_than_chance_is_not():
    assert chance_level([4, 4, 2]) == pytest.approx(1 / 3)
    assert [against_chance(k, 100, 0.25)["at_chance"] for k in (0, 25, 34, 35, 55)] == [True, True, True, False, False]
    assert against_chance(55, 100, 0.25) == {
        "level": 0.25,
        "questions": 100,
        "interval": pytest.approx([0.447, 0.650], abs=5e-4),
        "at_chance": False,
    }
