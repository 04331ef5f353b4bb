"""Intervals and tests over test examples: bootstrap and permutation, for runs of one seed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from holdfast.metrics.matrix import (
    BY_TASK,
    FIGURES,
    Metrics,
    Total,
    column_terms,
    common_scale,
    matrix_shape,
    means_of,
    metric_signs,
    needed_rows,
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

SUMMED_TOGETHER = 2**17
"""Sums that are held at once: few enough that they stay in a processor's cache."""

SMALL = 2**17
"""Multiplications of one product of matrices: so few that they are done by one thread, since threads that wait for each
other take more time than so small a product."""


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
    signs = metric_signs(metrics, checked_tasks([scores], weights, totals))
    if common_scale(metrics, len(signs)) is None:
        return dict.fromkeys(FIGURES)
    terms = _varied(_resampled(resampled_terms([scores], signs, weights, totals, resamples, seed)), scores)
    return {name: percentile_interval(values) for name, values in means_of(terms).items()}


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
    signs = metric_signs(metrics, checked_tasks([scores], weights, totals))
    terms = _varied(_resampled(resampled_terms([scores], signs, weights, totals, resamples, seed)), scores)
    return {name: [percentile_interval(column) for column in terms[name].T] for name in BY_TASK}


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
    drawn = np.zeros(1 + resamples)
    swapped = np.zeros(permutations)
    difference = 0.0
    for j, pair in enumerate(zip(a, b, strict=True)):
        both, total = example_statistics(list(pair), weights, totals, j)
        rng = np.random.default_rng([seed, j])
        difference += second_less_first(both.sum(axis=1), total)
        for places, sums in resampled_sums(both, resamples, rng):
            drawn[places] += second_less_first(sums, total)
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
        "interval": percentile_interval(drawn[1:] / len(a)) if min(map(len, a)) > 1 else None,
        "p": float((1 + as_far.sum()) / (1 + permutations)),
    }


def rise_intervals(
    pairs: Sequence[tuple[NDArray[Any], NDArray[Any]] | None],
    totals: Sequence[Total],
    resamples: int = 1000,
    seed: int = 0,
) -> list[list[float] | None]:
    """95 % intervals of the rise of each task's score by itself: a bootstrap over pairs, as of
    :func:`paired_difference` of one task.

    Args:
        pairs: for each task, statistics of its examples before and after, ``[examples, k]``; None where not measured.
        totals: of the tasks.

    Returns:
        [low, high] for each task; None where not measured, and for a task with a single test example.
    """
    found: list[list[float] | None] = [None] * len(pairs)
    alike: dict[tuple[Any, ...], list[int]] = {}
    for j, pair in enumerate(pairs):
        if pair is not None and len(pair[0]) > 1 and not np.isnan(pair).any():
            alike.setdefault((totals[j], pair[0].shape), []).append(j)
    for (total, _), places in alike.items():  # tasks that share the resamples that each would have alone
        statistics = np.stack([side for j in places for side in pairs[j] or ()]).astype(float)
        rises = np.empty((1 + resamples, len(places)))
        for part, sums in resampled_sums(statistics, resamples, np.random.default_rng([seed, 0])):
            rises[part] = second_less_first(sums.reshape(len(sums), len(places), 2, -1), total)
        for j, column in zip(places, rises[1:].T, strict=True):
            found[j] = percentile_interval(column)
    return found


def checked_tasks(runs: Sequence[Examples], weights: Weights, totals: Totals) -> int:
    """The number of tasks; ValueError if runs, weights and totals do not have the same."""
    if not runs:
        raise ValueError("there must be at least one run")
    shapes = {matrix_shape([len(row) for row in scores]) for scores in runs}
    if len(shapes) > 1:
        raise ValueError("the runs do not have the same number of tasks")
    _, tasks = shapes.pop()
    for name, given in (("weights", weights), ("totals", totals)):
        if given is not None and len(given) != tasks:
            raise ValueError(f"{name} has {len(given)} entries; it needs one for each of the {tasks} tasks")
    return tasks


def resampled_terms(
    runs: Sequence[Examples],
    signs: NDArray[np.int_],
    weights: Weights,
    totals: Totals,
    resamples: int,
    seed: int,
) -> dict[str, NDArray[np.float64]]:
    """The terms of all figures, of the test examples and of resamples of them: each [runs, 1 + resamples, T], the test
    examples themselves first.

    The resamples are the same in all runs. Each task is drawn by itself, so that the scores of one task in one part of
    its resamples are all that is held beside the terms.
    """
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1, not {resamples}")
    T = len(signs)
    terms = {name: np.full((T, len(runs), 1 + resamples), np.nan) for name in FIGURES}
    for j in range(T):
        rows = needed_rows(j, T)
        column = [scores[t][j] for scores in runs for t in rows]
        _same_size([row[j] for scores in runs for row in scores], j)
        if all(entry is None for entry in column):
            continue
        statistics, total = example_statistics(column, weights, totals, j)
        for drawn, sums in resampled_sums(statistics, resamples, np.random.default_rng([seed, j])):
            scores_of = total(sums).reshape(-1, len(runs), len(rows))
            for name, values in column_terms(scores_of, j, T, int(signs[j])).items():
                terms[name][j, :, drawn] = values.T
    return {name: np.moveaxis(values, 0, -1) for name, values in terms.items()}


def _resampled(terms: dict[str, NDArray[np.float64]]) -> dict[str, NDArray[np.float64]]:
    """The terms of the resamples of a single run, [resamples, T]."""
    return {name: values[0, 1:] for name, values in terms.items()}


def _varied(terms: dict[str, NDArray[np.float64]], scores: Examples) -> dict[str, NDArray[np.float64]]:
    """Terms of resamples, NaN for tasks of a single test example, since all resamples of it are the same."""
    for j in range(len(scores[0])):
        if any(entry is not None and len(entry) == 1 for entry in (row[j] for row in scores)):
            for values in terms.values():
                values[..., j] = np.nan
    return terms


def example_statistics(
    column: Sequence[Any], weights: Weights, totals: Totals, j: int
) -> tuple[NDArray[np.float64], Total]:
    """Statistics of task j's examples, [entries, examples, k], NaN where not measured, and the score of their sums
    [..., entries, k]."""
    given = None if totals is None else totals[j]
    examples = _examples(column, j, dimensions=1 if given is None else 2)
    if given is None:
        weight = _weight(weights, j, examples.shape[1])
        return np.stack([examples * weight, np.broadcast_to(weight, examples.shape)], axis=-1), _mean

    known = ~np.isnan(examples).any(axis=(1, 2))
    if known.all():
        return examples, given

    def total(sums: NDArray[np.float64]) -> NDArray[np.float64]:
        scores = np.full(sums.shape[:-1], np.nan)
        scores[..., known] = given(sums[..., known, :])
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


def resampled_sums(
    statistics: NDArray[np.float64], resamples: int, rng: np.random.Generator
) -> Iterator[tuple[slice, NDArray[np.float64]]]:
    """Sums of ``statistics`` [entries, examples, k] over the examples, and then over resamples of them.

    Yields:
        part by part, where among the 1 + resamples they are, and the sums, [part, entries, k].
    """
    entries, n, k = statistics.shape
    constant = (statistics == statistics[:1]).all(axis=(0, 1))  # such as the weights: the same at all entries
    once, each = statistics[0][:, constant], statistics[:, :, ~constant]
    by_example = np.concatenate([each.swapaxes(0, 1).reshape(n, -1), once], axis=1)
    together = max(1, min(DRAWN_TOGETHER // n, SUMMED_TOGETHER // (entries * k)))
    rows = max(1, SMALL // by_example.size)

    def summed(counts: NDArray[np.float64]) -> NDArray[np.float64]:
        flat, sums = np.empty((len(counts), by_example.shape[1])), np.empty((len(counts), entries, k))
        for start in range(0, len(counts), rows):
            np.matmul(counts[start : start + rows], by_example, out=flat[start : start + rows])
        split = flat.shape[1] - once.shape[1]
        sums[:, :, ~constant] = flat[:, :split].reshape(len(counts), entries, -1)
        sums[:, :, constant] = flat[:, None, split:]
        return sums

    yield slice(1), summed(np.ones((1, n)))
    for start in range(0, resamples, together):
        part = min(together, resamples - start)
        places = rng.integers(n, size=(part, n)) + n * np.arange(part)[:, None]
        counts = np.bincount(places.ravel(), minlength=places.size).reshape(places.shape)
        yield slice(1 + start, 1 + start + part), summed(counts.astype(float))


def _same_size(column: Sequence[Any], j: int) -> None:
    """Raise ValueError if a task does not have the same test examples at every stage, as far as their number shows."""
    if len({len(entry) for entry in column if entry is not None}) > 1:
        raise _other_examples(j)


def _other_examples(j: int) -> ValueError:
    return ValueError(f"task {j} (counted from 0) must have the same test examples, at least one, at every stage")


def _examples(column: Sequence[Any], j: int, dimensions: int) -> NDArray[np.float64]:
    """What is known of one task's examples, [entries, examples] or [entries, examples, k]; NaN where not measured."""
    arrays = [None if entry is None else np.asarray(entry, dtype=float) for entry in column]
    sizes = {array.shape for array in arrays if array is not None}
    shape = sizes.pop()
    if sizes or len(shape) != dimensions or shape[0] == 0:
        raise _other_examples(j)
    return np.stack([np.full(shape, np.nan) if array is None else array for array in arrays])
