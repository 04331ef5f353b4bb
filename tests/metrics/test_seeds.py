"""Intervals and tests over seeds: against plain formulas, and calibrated by simulation."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from holdfast.metrics import holm, mean_interval, seed_difference, seed_intervals
from holdfast.metrics.seeds import Spread

TRIALS, RESAMPLES = 800, 100


def answers(
    rng: np.random.Generator, difficulty: NDArray[np.float64], seeds: int, seed_noise: float, common: float
) -> NDArray[np.float64]:
    """Right (1) or wrong (0), [trials, seeds, examples], about 0.7 right.

    Args:
        difficulty: of each example, [trials, examples], standard normal; the same for all seeds.
        seed_noise: standard deviation by which a training moves the accuracy.
        common: the share of an example's variance that all seeds have in common.
    """
    trials, examples = difficulty.shape
    threshold = stats.norm.ppf(0.7)
    moved = rng.normal(size=(trials, seeds, 1)) * seed_noise / stats.norm.pdf(threshold)
    own = rng.normal(size=(trials, seeds, examples)) * np.sqrt(1 - common)
    return (threshold + moved + difficulty[:, None] * np.sqrt(common) + own > 0).astype(float)


def draws(rng: np.random.Generator, examples: int) -> NDArray[np.float64]:
    """How often each resample draws each example, as a share of all: [examples, resamples]."""
    return rng.multinomial(examples, np.full(examples, 1 / examples), size=RESAMPLES).T / examples


def mean_accuracy(seed_noise: float) -> float:
    threshold = stats.norm.ppf(0.7)
    return float(stats.norm.cdf(threshold / np.hypot(1, seed_noise / stats.norm.pdf(threshold))))


SHORT = [(2, 40, 0.1, 0.3), (3, 40, 0.05, 0.9), (3, 400, 0.1, 0.3), (10, 40, 0.0, 0.9)]
"""Settings that `make test` tries; the others are slow."""


@pytest.mark.parametrize(
    ("seeds", "examples", "seed_noise", "common"),
    [
        pytest.param(*setting, marks=() if setting in SHORT else pytest.mark.slow)
        for setting in product((2, 3, 5, 10), (40, 400), (0.0, 0.05, 0.1), (0.3, 0.9))
    ],
)
def test_intervals_cover_and_tests_keep_their_size(seeds: int, examples: int, seed_noise: float, common: float):
    """95 % intervals cover 93 to 97 %, and of two methods that are alike 3 to 7 % differ at p <= 0.05: the Monte Carlo
    error of either is 0.8 %."""
    rng = np.random.default_rng([seeds, examples, int(100 * seed_noise), int(10 * common)])
    difficulty = rng.normal(size=(TRIALS, examples))
    a, b = (answers(rng, difficulty, seeds, seed_noise, common) for _ in range(2))
    drawn = draws(rng, examples)
    again = [scores @ drawn for scores in (a, b)]
    truth = mean_accuracy(seed_noise)
    covered = apart = apart_unpaired = 0
    for trial in range(TRIALS):
        first, second = a[trial].mean(axis=1), b[trial].mean(axis=1)
        low, high = Spread.of(first, again[0][trial]).interval(float(first.mean()))
        covered += low <= truth <= high
        difference = float(second.mean() - first.mean())
        apart += Spread.of(second - first, again[1][trial] - again[0][trial]).p(difference) <= 0.05
        spread = Spread.of_difference((first, again[0][trial]), (second, again[1][trial]))
        apart_unpaired += spread.p(difference) <= 0.05
    slack = 0.02 + 2 * 0.008
    assert abs(covered / TRIALS - 0.95) <= slack
    assert abs(apart / TRIALS - 0.05) <= slack
    assert abs(apart_unpaired / TRIALS - 0.05) <= slack


@pytest.mark.parametrize(
    ("fewer", "more"), [(2, 3), (2, 10), *(pytest.param(*n, marks=pytest.mark.slow) for n in ((2, 5), (3, 5), (3, 10)))]
)
def test_other_numbers_of_seeds_keep_the_size_of_a_test(fewer: int, more: int):
    """Of two equal methods 2 to 7 % differ at p <= 0.05; where one's seeds move it three times as far, 10 % at most."""
    rng = np.random.default_rng([fewer, more])
    apart = {}
    for noise in ((1.0, 1.0), (1.0, 3.0), (3.0, 1.0)):
        found = []
        for _ in range(TRIALS):
            runs = [rng.normal(size=n) * by for n, by in zip((fewer, more), noise, strict=True)]
            a, b = ((values, np.repeat(values[:, None], 2, axis=1)) for values in runs)
            found.append(Spread.of_difference(a, b).p(float(runs[1].mean() - runs[0].mean())) <= 0.05)
        apart[noise] = np.mean(found)
    error = 2 * np.sqrt(0.05 * 0.95 / TRIALS)
    assert 0.02 - error <= apart[1.0, 1.0] <= 0.07 + error, apart
    assert max(apart.values()) <= 0.09 + error, apart


@pytest.mark.parametrize("seeds", [2, 3, 10])
def test_the_minimum_detectable_difference_is_found_as_often_as_it_says(seeds: int):
    rng = np.random.default_rng(seeds)
    noise = rng.normal(size=(1000, seeds)) * 0.1
    spreads = [Spread.of(values, np.repeat(values[:, None], 2, axis=1)) for values in noise]
    true = float(np.median([spread.detectable for spread in spreads]))
    found = [spread.p(float(values.mean() + true)) <= 0.05 for spread, values in zip(spreads, noise, strict=True)]
    assert np.mean(found) == pytest.approx(0.8, abs=0.03)


@pytest.mark.parametrize("freedom", [1.0, 2.7, 9.0, 1000.0])
def test_the_minimum_detectable_difference_has_its_power(freedom: float):
    spread = Spread(seeds=0.04, examples=0.0, seed_freedom=freedom)
    shift = spread.detectable / spread.error * np.sqrt(stats.chi2.ppf(0.5, freedom) / freedom)
    assert stats.nct.sf(stats.t.ppf(0.975, freedom), freedom, shift) == pytest.approx(0.8, abs=1e-6)
    assert spread.p(0.5) == pytest.approx(2 * stats.t.sf(0.5 / 0.2, freedom))


def test_the_variance_is_that_of_a_plain_loop():
    rng = np.random.default_rng(0)
    values, again = rng.normal(size=4), rng.normal(size=(4, 50))
    means = [sum(again[i, r] for i in range(4)) / 4 for r in range(50)]
    alone = np.mean([np.var([again[i, r] - means[r] for r in range(50)]) for i in range(4)]) / 3
    spread = Spread.of(values, again)
    assert spread.seeds == pytest.approx(np.var(values, ddof=1) / 4)
    assert spread.examples == pytest.approx(max(np.var(means) - alone, 0))
    assert spread.freedom == pytest.approx(3 * (1 + 3 / 8 * spread.examples / spread.seeds) ** 1.25)


def test_a_mean_over_seeds_has_students_interval():
    values = np.random.default_rng(3).normal(size=7)
    expected = stats.t.interval(0.95, 6, loc=values.mean(), scale=stats.sem(values))
    assert mean_interval(values.tolist()) == pytest.approx(expected)
    assert mean_interval([0.5]) is None


def test_a_matrix_has_the_interval_of_its_parts():
    rng = np.random.default_rng(1)
    runs = [[[rng.random(30) < 0.5], [rng.random(30) < 0.5 + 0.1 * k]] for k in range(3)]
    values = np.array([run[1][0].mean() for run in runs])
    low, high = seed_intervals(runs)["average"]
    assert (low + high) / 2 == pytest.approx(values.mean())
    assert high - low > 2 * stats.t.ppf(0.975, 20) * stats.sem(values)
    assert seed_intervals(runs)["forgetting"] is None


def test_pairs_of_seeds_find_what_the_seeds_have_in_common():
    """Both methods rise and fall with the seed: seed by seed the difference is clear, otherwise it is not."""
    rng = np.random.default_rng(2)
    level = np.array([0.3, 0.5, 0.7, 0.9])
    a, b = ([[(rng.random(2000) < each + more).astype(float)] for each in level] for more in (0.0, 0.08))
    paired, unpaired = (seed_difference(a, b, paired=way) for way in (True, False))
    assert paired["difference"] == pytest.approx(unpaired["difference"]) and paired["over"] == "seeds"
    assert paired["p"] < 0.05 < unpaired["p"]
    assert paired["detectable"] < unpaired["detectable"]


def test_one_seed_speaks_of_test_examples():
    a, b = [[np.zeros(30)]], [[np.array([1.0] * 10 + [0.0] * 20)]]
    assert seed_difference(a, b, paired=True)["over"] == "test examples"
    with pytest.raises(ValueError, match="as many on both sides"):
        seed_difference(a, [*b, *b], paired=True)


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.6]) == [1.0, 1.0] and holm([]) == []
