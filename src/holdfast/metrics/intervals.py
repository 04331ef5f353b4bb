"""Intervals and tests over test examples: bootstrap and permutation, for runs of one seed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from holdfast.metrics.matrix import (
    FIGURES,
    Metrics,
    Total,
    common_scale,
    figures_of,
    matrix_shape,
    metric_signs,
    task_terms,
)

Examples = Sequence[Sequence[Sequence[float] | NDArray[Any] | None]]
"""T+1 rows of T entries; an entry holds the scores of a task's test examples, ``[examples]`` in the same order at every
stage, or None where not measured."""
Weights = Sequence[Sequence[float] | NDArray[Any] | None] | None
"""For every task, ``[examples]`` weights of its examples, for example tokens where the metric is a loss per token;
None: all weigh the same."""
Totals = Sequence[Total | None] | None
"""For every task None, or how its score follows from sums of its examples' statistics, ``[..., k]`` to ``[...]``: for
scores that are no means over examples, such as a macro F1 or a corpus BLEU. Where it is given, a task's entries are
statistics, ``[examples, k]``, in place of scores."""

DRAWN_TOGETHER = 1_000_000
"""Examples that are drawn in one call: a bound on its memory."""


def intervals(
    scores: Examples,
    *,
    metrics: Metrics = None,
    weights: Weights = None,
    totals: Totals = None,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, list[float] | None]:
    """95 % intervals of the summary figures: percentile bootstrap over test examples.

    A resample draws the test examples of a task with replacement, and the same examples at every stage, since stages
    are measured on the same examples; tasks are drawn independently. The intervals say how much a figure depends on
    the test set, not how much it varies from one training seed to the next: for that see
    :func:`holdfast.metrics.seed_intervals`.

    Args:
        scores: the examples' scores.
        metrics: as in :func:`summarize`.
        weights: of the examples.
        totals: of the tasks whose entries are statistics.
        resamples: how many resamples are drawn.
        seed: the same seed gives the same intervals.

    Returns:
        {figure: [low, high]} for the figures that come from the score matrix; None for a figure that
        :func:`summarize` would give as None, and for one that a task with a single test example is part of.

    Raises:
        ValueError: a shape is wrong, or a task does not have the same number of examples at every stage.
    """
    matrices = _varied(resampled_matrices([scores], weights, totals, resamples, seed)[0], scores)
    scale = common_scale(metrics, matrices.shape[-1])
    if scale is None:
        return dict.fromkeys(FIGURES)
    return {name: percentile_interval(values) for name, values in figures_of(matrices, scale).items()}


def task_intervals(
    scores: Examples,
    *,
    metrics: Metrics = None,
    weights: Weights = None,
    totals: Totals = None,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, list[list[float] | None]]:
    """95 % intervals of the figures of :func:`by_task`, as :func:`intervals` makes them: T a figure, None as there."""
    matrices = _varied(resampled_matrices([scores], weights, totals, resamples, seed)[0], scores)
    terms = task_terms(matrices, metric_signs(metrics, matrices.shape[-1]))
    return {name: [percentile_interval(column) for column in values.T] for name, values in terms.items()}


def paired_difference(
    a: Sequence[Sequence[float] | NDArray[Any]],
    b: Sequence[Sequence[float] | NDArray[Any]],
    *,
    weights: Weights = None,
    totals: Totals = None,
    resamples: int = 1000,
    permutations: int = 10_000,
    seed: int = 0,
) -> dict[str, Any]:
    """Difference between two methods that answered the same test examples, its 95 % interval and its p-value.

    difference = mean_j ( S_j(b) - S_j(a) ), where S_j is the weighted mean over the examples of task j, or its total

    The interval is a percentile bootstrap over pairs: an example is drawn with both of its scores. The p-value is that
    of a two-sided permutation test: if the methods were alike, each pair might as well have come the other way round;
    p = (1 + #{|d*| >= |d|}) / (1 + permutations).

    Args:
        a, b: for each task, ``[examples]`` scores of the same examples in the same order; of several seeds the means.
        weights: of the examples.
        totals: of the tasks whose entries are statistics.

    Returns:
        ``difference`` (b less a), ``interval`` [low, high], None where a task has a single test example, and ``p``.

    Raises:
        ValueError: the two do not have the same tasks and examples.
    """
    if not a or [len(task) for task in a] != [len(task) for task in b]:
        raise ValueError("a and b must have the same tasks with the same test examples, at least one of each")
    drawn = np.zeros(resamples)
    swapped = np.zeros(permutations)
    difference = 0.0
    for j, pair in enumerate(zip(a, b, strict=True)):
        both, total = example_statistics(list(pair), weights, totals, j)
        rng = np.random.default_rng([seed, j])
        difference += second_less_first(both.sum(axis=1), total)
        drawn += second_less_first(resampled_sums(both, resamples, rng), total)
        first, change = both[0].sum(axis=0), both[1] - both[0]
        change = change[(change != 0).any(axis=1)]  # where nothing differs, it is the same either way round
        whole = both.sum(axis=(0, 1))
        for start in range(0, permutations, 1000):
            part = swapped[start : start + 1000]
            sums = first + rng.integers(0, 2, size=(len(part), len(change)), dtype=np.int8) @ change
            part += second_less_first(np.stack([sums, whole - sums], axis=1), total)
    as_far = np.abs(swapped) >= abs(difference) * (1 - 1e-12)
    return {
        "difference": float(difference / len(a)),
        "interval": percentile_interval(drawn / len(a)) if min(map(len, a)) > 1 else None,
        "p": float((1 + as_far.sum()) / (1 + permutations)),
    }


def resampled_matrices(
    runs: Sequence[Examples], weights: Weights, totals: Totals, resamples: int, seed: int
) -> NDArray[np.float64]:
    """Score matrices of resampled test examples, the same examples in all runs: [runs, resamples, T+1, T]."""
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1, not {resamples}")
    if not runs:
        raise ValueError("there must be at least one run")
    shapes = {matrix_shape([len(row) for row in scores]) for scores in runs}
    if len(shapes) > 1:
        raise ValueError("the runs do not have the same number of tasks")
    stages, tasks = shapes.pop()
    for name, given in (("weights", weights), ("totals", totals)):
        if given is not None and len(given) != tasks:
            raise ValueError(f"{name} has {len(given)} entries; it needs one for each of the {tasks} tasks")
    matrices = np.full((len(runs), resamples, stages, tasks), np.nan)
    for j in range(tasks):
        column = [row[j] for scores in runs for row in scores]
        if any(entry is not None for entry in column):
            statistics, total = example_statistics(column, weights, totals, j)
            scores = total(resampled_sums(statistics, resamples, np.random.default_rng([seed, j])))
            matrices[:, :, :, j] = scores.reshape(resamples, len(runs), stages).swapaxes(0, 1)
    return matrices


def _varied(matrices: NDArray[np.float64], scores: Examples) -> NDArray[np.float64]:
    """Resampled score matrices, NaN for tasks of a single test example, since all resamples of it are the same."""
    for j in range(matrices.shape[-1]):
        if any(entry is not None and len(entry) == 1 for entry in (row[j] for row in scores)):
            matrices[..., j] = np.nan
    return matrices


def example_statistics(
    column: Sequence[Any], weights: Weights, totals: Totals, j: int
) -> tuple[NDArray[np.float64], Total]:
    """Statistics of task j's examples, [entries, examples, k], NaN where not measured, and the score of their sums."""
    given = None if totals is None else totals[j]
    examples = _examples(column, j, dimensions=1 if given is None else 2)
    if given is None:
        weight = _weight(weights, j, examples.shape[1])
        return np.stack([examples * weight, np.broadcast_to(weight, examples.shape)], axis=-1), _mean

    def total(sums: NDArray[np.float64]) -> NDArray[np.float64]:
        known = ~np.isnan(sums).any(axis=-1)
        scores = np.full(known.shape, np.nan)
        scores[known] = given(sums[known])
        return scores

    return examples, total


def _mean(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    return sums[..., 0] / sums[..., 1]


def second_less_first(sums: NDArray[np.float64], total: Total) -> Any:
    """Score of the second less score of the first, of sums [..., 2, k]: [...]."""
    scores = total(sums)
    return scores[..., 1] - scores[..., 0]


def _weight(weights: Weights, j: int, examples: int) -> NDArray[np.float64]:
    """Weights of task j's examples, [examples]."""
    given = None if weights is None else weights[j]
    weight = np.ones(examples) if given is None else np.asarray(given, dtype=float)
    if weight.shape != (examples,):
        raise ValueError(f"weights[{j}] must have one number for each of the {examples} test examples")
    return weight


def percentile_interval(values: NDArray[np.float64]) -> list[float] | None:
    """The ends of a percentile interval over resamples; None if one of them is not known."""
    known = bool(np.isfinite(values).all())
    return [float(v) for v in np.percentile(values, [2.5, 97.5])] if known else None


def resampled_sums(statistics: NDArray[np.float64], resamples: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Sums of ``statistics`` [entries, examples, k] over resamples of the examples: [resamples, entries, k]."""
    entries, n, k = statistics.shape
    by_example = statistics.swapaxes(0, 1).reshape(n, entries * k)
    sums = np.empty((resamples, entries * k))
    together = max(1, DRAWN_TOGETHER // n)
    for start in range(0, resamples, together):
        part = sums[start : start + together]
        places = rng.integers(n, size=(len(part), n)) + n * np.arange(len(part))[:, None]
        counts = np.bincount(places.ravel(), minlength=places.size).reshape(places.shape)
        np.matmul(counts.astype(float), by_example, out=part)
    return sums.reshape(resamples, entries, k)


def _examples(column: Sequence[Any], j: int, dimensions: int) -> NDArray[np.float64]:
    """What is known of one task's examples, [entries, examples] or [entries, examples, k]; NaN where not measured."""
    arrays = [None if entry is None else np.asarray(entry, dtype=float) for entry in column]
    sizes = {array.shape for array in arrays if array is not None}
    shape = sizes.pop()
    if sizes or len(shape) != dimensions or shape[0] == 0:
        raise ValueError(f"task {j} (counted from 0) must have the same test examples, at least one, at every stage")
    return np.stack([np.full(shape, np.nan) if array is None else array for array in arrays])
