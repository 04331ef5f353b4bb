"""Intervals and tests over seeds: how a figure varies from one training to the next, and with the test examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from holdfast.metrics.intervals import (
    Examples,
    Totals,
    Weights,
    checked_tasks,
    example_statistics,
    intervals,
    paired_difference,
    resampled_sums,
    resampled_terms,
)
from holdfast.metrics.matrix import FIGURES, Metrics, common_scale, means_of, metric_signs

LEVEL = 0.95
POWER = 0.8
"""Of a true difference as large as the minimum detectable one, this share of experiments finds it."""


@dataclass(frozen=True)
class Spread:
    """The variance of a mean over seeds, and how well it is known.

    With n runs, values f_i, and f_i* of resampled test examples, which are the same for all runs:

    - of the seeds: ``Var_i(f_i) / n``
    - of the test examples: ``Var*(mean_i f_i*)``, less ``Var*(f_i* - mean f*) / (n - 1)``, which is what each run adds
      by itself, since the first term has that already
    - degrees of freedom: ``m (1 + m / (2 (m + 1)) examples / seeds)^1.25``, where m = n - 1

    The last is Satterthwaite's formula, damped: his own, ``m (1 + examples / seeds)^2``, gives 95 % intervals of two
    seeds that cover as little as 87 %; with this one they cover 93 to 97 %, whichever part is the larger.

    Attributes:
        seeds, examples: the two parts of the variance.
        seed_freedom: degrees of freedom of the seeds' part alone.
    """

    seeds: float
    examples: float
    seed_freedom: float

    @classmethod
    def of(cls, values: NDArray[np.float64], resampled: NDArray[np.float64]) -> Spread:
        """The spread of a mean over runs: ``values`` [runs], at least two, and ``resampled`` [runs, resamples]."""
        runs = len(values)
        common = resampled.mean(axis=0).var() - _of_each_run(resampled)
        return cls(float(values.var(ddof=1) / runs), max(float(common), 0.0), runs - 1)

    @classmethod
    def of_difference(cls, a: Sequence[NDArray[np.float64]], b: Sequence[NDArray[np.float64]]) -> Spread:
        """The spread of the difference of two means over different seeds: values and resampled of each, as above.

        With as many runs on either side the seeds have Student's degrees of freedom. With n on one side and N > n on
        the other they have Welch's w, damped: ``w^(1 - d) (n - 1)^d``, where d = (1 - n / N) / n. With w itself, 10 of
        100 pairs of equal methods differ at p <= 0.05 where n = 2 and N = 10; with this one, 6.
        """
        parts = [float(values.var(ddof=1) / len(values)) for values, _ in (a, b)]
        freedom = [len(values) - 1 for values, _ in (a, b)]
        seed_freedom = float(sum(freedom))
        if freedom[0] != freedom[1] and any(parts):
            welch = sum(parts) ** 2 / sum(part**2 / own for part, own in zip(parts, freedom, strict=True))
            fewest, most = sorted(len(values) for values, _ in (a, b))
            damping = (1 - fewest / most) / fewest
            seed_freedom = welch ** (1 - damping) * (fewest - 1) ** damping
        common = (b[1].mean(axis=0) - a[1].mean(axis=0)).var() - _of_each_run(a[1]) - _of_each_run(b[1])
        return cls(sum(parts), max(float(common), 0.0), seed_freedom)

    @property
    def freedom(self) -> float:
        """Degrees of freedom of Student's t."""
        if self.seeds == 0:
            return 1e6
        m = self.seed_freedom
        return min(m * (1 + m / (2 * (m + 1)) * self.examples / self.seeds) ** 1.25, 1e6)

    @property
    def error(self) -> float:
        """Standard error of the mean."""
        return float(np.sqrt(self.seeds + self.examples))

    def interval(self, mean: float) -> list[float]:
        """The 95 % interval [low, high] of the mean."""
        half = self._quantile((1 + LEVEL) / 2) * self.error
        return [mean - half, mean + half]

    def p(self, mean: float) -> float:
        """Two-sided p-value of the mean's being 0."""
        from scipy.special import stdtr

        if self.error == 0:
            return 1.0 if mean == 0 else 0.0
        return float(2 * stdtr(self.freedom, -abs(mean) / self.error))

    @property
    def detectable(self) -> float:
        """The true value that such an experiment would tell from 0 with probability :data:`POWER`, at p < 0.05.

        It is a median-unbiased estimate: the noncentrality that has this power, times the standard error, which is
        divided by its own median where the true one is 1.
        """
        from scipy.special import chdtri, nctdtrinc

        freedom = min(self.freedom, 1000)
        needed = nctdtrinc(freedom, 1 - POWER, self._quantile((1 + LEVEL) / 2))
        return float(needed) * self.error / float(np.sqrt(chdtri(freedom, 0.5) / freedom))

    def _quantile(self, share: float) -> float:
        from scipy.special import stdtrit  # scipy.stats has the same, and takes long to import

        return float(stdtrit(self.freedom, share))


def seed_intervals(
    runs: Sequence[Examples],
    *,
    metrics: Metrics = None,
    weights: Weights = None,
    totals: Totals = None,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, list[float] | None]:
    """95 % intervals of the mean of each figure over runs that differ in their seed: Student's t, see :class:`Spread`.

    They hold for other seeds and other test examples of the same tasks. Of a single run nothing can be said of other
    seeds; then they are those of :func:`holdfast.metrics.intervals.intervals`, over test examples alone.

    Args:
        runs: the examples' scores of each run; all have the same test examples.
        resamples: how often the test examples are drawn anew, for their part of the variance.

    The rest is as in :func:`holdfast.metrics.intervals.intervals`.
    """
    if len(runs) == 1:
        return intervals(runs[0], metrics=metrics, weights=weights, totals=totals, resamples=resamples, seed=seed)
    signs = metric_signs(metrics, checked_tasks(runs, weights, totals))
    if common_scale(metrics, len(signs)) is None:
        return dict.fromkeys(FIGURES)
    figures = means_of(resampled_terms(runs, signs, weights, totals, resamples, seed))
    return {
        name: _interval(values[:, 0], values[:, 1:]) if np.isfinite(values).all() else None
        for name, values in figures.items()
    }


def mean_interval(values: Sequence[float]) -> list[float] | None:
    """95 % interval of a mean over seeds, by Student's t, of a figure of which each run gives one number.

    None for a single run.
    """
    if len(values) < 2:
        return None
    known = np.asarray(values, dtype=float)
    return _interval(known, np.repeat(known[:, None], 2, axis=1))


def seed_difference(
    a: Sequence[Sequence[NDArray[Any] | Sequence[float]]],
    b: Sequence[Sequence[NDArray[Any] | Sequence[float]]],
    *,
    paired: bool,
    weights: Weights = None,
    totals: Totals = None,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """Difference between two methods over seeds, on the same test examples: mean, 95 % interval and p-value.

    difference = mean_i mean_j S_j(b_i) - mean_i mean_j S_j(a_i), for tasks j and seeds i; interval and p by Student's t
    with the variance of :class:`Spread`. If one of the two has a single seed, nothing is known of training noise: the
    result is that of :func:`holdfast.metrics.intervals.paired_difference` and speaks of test examples alone.

    Args:
        a, b: for each run, for each task, ``[examples]`` scores, or statistics where ``totals`` are given.
        paired: whether run i of ``a`` and of ``b`` have the same seed; then differences are taken seed by seed.
        weights, totals: as in :func:`holdfast.metrics.intervals.paired_difference`.

    Returns:
        ``difference`` (b less a), ``interval`` [low, high], ``p``, ``detectable`` (the true difference that would be
        found in 80 % of such experiments at p < 0.05) and ``over``: ``seeds`` or ``test examples``.

    Raises:
        ValueError: the runs do not have the same tasks and examples, or ``paired`` runs are not as many.
    """
    if paired and len(a) != len(b):
        raise ValueError(f"paired runs must be as many on both sides, not {len(a)} and {len(b)}")
    if min(len(a), len(b)) == 1:
        first, second = ([np.mean(task, axis=0) for task in zip(*runs, strict=True)] for runs in (a, b))
        found = paired_difference(first, second, weights=weights, totals=totals, resamples=resamples, seed=seed)
        detectable = None
        if found["interval"] is not None:
            low, high = found["interval"]
            detectable = (1.96 + 0.8416) * (high - low) / (2 * 1.96)
        return found | {"detectable": detectable, "over": "test examples"}
    values, resampled = _averages([*a, *b], weights, totals, resamples, seed)
    mean = float(values[len(a) :].mean() - values[: len(a)].mean())
    if paired:
        spread = Spread.of(values[len(a) :] - values[: len(a)], resampled[len(a) :] - resampled[: len(a)])
    else:
        of_a, of_b = slice(len(a)), slice(len(a), None)
        spread = Spread.of_difference((values[of_a], resampled[of_a]), (values[of_b], resampled[of_b]))
    return {
        "difference": mean,
        "interval": spread.interval(mean),
        "p": spread.p(mean),
        "detectable": spread.detectable,
        "over": "seeds",
    }


def holm(values: Sequence[float]) -> list[float]:
    """p-values corrected for their number, so that the chance of one false finding among all stays below the level.

    Sorted ascending, the k-th of m is multiplied by m - k + 1, and none is below one before it (Holm 1979).
    """
    order = np.argsort(values)
    factors = np.arange(len(values), 0, -1)
    corrected = np.minimum(np.maximum.accumulate(np.asarray(values, dtype=float)[order] * factors), 1.0)
    result = np.empty(len(values))
    result[order] = corrected
    return [float(value) for value in result]


def _of_each_run(resampled: NDArray[np.float64]) -> float:
    """The variance with the test examples that each run has by itself, of the mean over runs [runs, resamples]."""
    return float((resampled - resampled.mean(axis=0)).var(axis=1).mean() / (len(resampled) - 1))


def _interval(values: NDArray[np.float64], resampled: NDArray[np.float64]) -> list[float]:
    return Spread.of(values, resampled).interval(float(values.mean()))


def _averages(
    runs: Sequence[Sequence[Any]], weights: Weights, totals: Totals, resamples: int, seed: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Each run's mean over tasks, [runs], and the same of resampled test examples, [runs, resamples]."""
    if not runs[0] or any([len(task) for task in run] != [len(task) for task in runs[0]] for run in runs):
        raise ValueError("all runs must have the same tasks with the same test examples, at least one of each")
    scores = np.zeros((len(runs), 1 + resamples))
    for j in range(len(runs[0])):
        statistics, total = example_statistics([run[j] for run in runs], weights, totals, j)
        for part, sums in resampled_sums(statistics, resamples, np.random.default_rng([seed, j])):
            scores[:, part] += total(sums).T
    scores /= len(runs[0])
    return scores[:, 0], scores[:, 1:]
