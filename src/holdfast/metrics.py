"""What the score matrix says: its summary figures and their bootstrap intervals, as pure functions on numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import numpy as np
from numpy.typing import NDArray

LOWER_IS_BETTER = ("loss", "perplexity")

FIGURES = ("average", "new_task", "forgetting", "backward_transfer", "forward_transfer")

Scores = Sequence[Sequence[float | None]] | NDArray[Any]
Metrics = str | Sequence[str] | Mapping[str, str] | None


def summarize(
    scores: Scores,
    *,
    metrics: Metrics = None,
    general: Mapping[str, Sequence[float | None]] | None = None,
) -> dict[str, float | None]:
    """Summarise a score matrix S, where S[t][j] is the score of task j after stage t and row 0 is before training.

    With T tasks, numbered from 1:

    - average = mean_j S[T][j]
    - new_task = mean_j S[j][j]
    - forgetting = mean_{j<T} ( max_{j<=t<T} S[t][j] - S[T][j] ); positive is worse
    - backward_transfer = mean_{j<T} ( S[T][j] - S[j][j] ); negative is worse
    - forward_transfer = mean_{j>1} ( S[j-1][j] - S[0][j] ); negative is worse
    - general_change = mean over the accuracy-like measures of general ability of (last - first); negative is worse

    For a metric of which lower is better, differences are taken the other way round, so that their signs keep their
    meaning: forgetting is S[T][j] - min_{j<=t<T} S[t][j]. Nothing is rescaled: percent in, percent out.

    Args:
        scores: T+1 rows of T numbers, nested sequences or an array; None or NaN where not measured.
        metrics: the metric of every task: one name for all, T names, or {task: name}; names in ``LOWER_IS_BETTER``
            are lower-is-better, all others (and None) higher-is-better.
        general: {measure: T+1 values}; measures whose names begin with one of ``LOWER_IS_BETTER`` do not enter
            general_change.

    Returns:
        The six figures. A figure is None if a score that it needs is missing or not finite, if it has no terms
        (T = 1: forgetting and both transfers), or if the metrics of the tasks have no common scale: a mean over
        accuracies and losses, or over losses and perplexities, does not exist.

    Raises:
        ValueError: the shape of ``scores``, ``metrics`` or ``general`` is wrong, or an entry is not a number.
    """
    matrix = _matrix(scores)
    stages, tasks = matrix.shape
    scale = _common_scale(metrics, tasks)
    summary = dict.fromkeys(FIGURES) if scale is None else {k: _finite(v) for k, v in _figures(matrix, scale).items()}
    return summary | {"general_change": _general_change(general or {}, stages)}


def intervals(
    scores: Sequence[Sequence[Sequence[float] | NDArray[Any] | None]],
    *,
    metrics: Metrics = None,
    weights: Sequence[Sequence[float] | NDArray[Any] | None] | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, list[float] | None]:
    """95 % intervals of the summary figures: percentile bootstrap over test examples.

    A resample draws the test examples of a task with replacement, and the same examples at every stage, since stages
    are measured on the same examples; tasks are drawn independently. The intervals say how much a figure depends on
    the test set, not how much it varies from one training seed to the next.

    Args:
        scores: T+1 rows of T entries; an entry holds the scores of a task's test examples, ``[examples]`` in the same
            order at every stage, or None where not measured.
        metrics: as in :func:`summarize`.
        weights: for every task, ``[examples]`` weights of its examples, for example tokens where the metric is a loss
            per token; None: all weigh the same.
        resamples: how many resamples are drawn.
        seed: the same seed gives the same intervals.

    Returns:
        {figure: [low, high]} for the five figures that come from the score matrix; None for a figure that
        :func:`summarize` would give as None.

    Raises:
        ValueError: a shape is wrong, or a task does not have the same number of examples at every stage.
    """
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1, not {resamples}")
    stages, tasks = _shape([len(row) for row in scores])
    scale = _common_scale(metrics, tasks)
    if scale is None:
        return dict.fromkeys(FIGURES)
    if weights is not None and len(weights) != tasks:
        raise ValueError(f"weights has {len(weights)} entries; it needs one for each of the {tasks} tasks")
    matrices = np.full((resamples, stages, tasks), np.nan)
    for j in range(tasks):
        examples = _examples([row[j] for row in scores], j)
        if examples is None:
            continue
        given = None if weights is None else weights[j]
        weight = np.ones(examples.shape[1]) if given is None else np.asarray(given, dtype=float)
        if weight.shape != examples.shape[1:]:
            raise ValueError(f"weights[{j}] must have one number for each of the {examples.shape[1]} test examples")
        matrices[:, :, j] = _resampled_means(examples, weight, resamples, np.random.default_rng([seed, j]))
    result: dict[str, list[float] | None] = {}
    for name, values in _figures(matrices, scale).items():
        known = bool(np.isfinite(values).all())
        result[name] = [float(v) for v in np.percentile(values, [2.5, 97.5])] if known else None
    return result


def _figures(matrices: NDArray[np.float64], better: int) -> dict[str, NDArray[np.float64]]:
    """The figures of score matrices ``[..., T+1, T]``, each ``[...]``; NaN where a score is missing.

    ``better`` is 1 where higher scores are better and -1 where lower ones are.
    """
    T = matrices.shape[-1]
    gains = better * matrices
    first, last = gains[..., 0, :], gains[..., T, :]
    just_learned = np.stack([gains[..., j + 1, j] for j in range(T)], axis=-1)
    figures = {"average": matrices[..., T, :].mean(axis=-1), "new_task": better * just_learned.mean(axis=-1)}
    if T == 1:
        none = np.full(matrices.shape[:-2], np.nan)
        return figures | dict.fromkeys(("forgetting", "backward_transfer", "forward_transfer"), none)
    best = np.stack([gains[..., j + 1 : T, j].max(axis=-1) for j in range(T - 1)], axis=-1)
    just_before = np.stack([gains[..., j, j] for j in range(1, T)], axis=-1)
    with np.errstate(invalid="ignore"):  # the difference of two infinite losses is no number, hence missing
        return figures | {
            "forgetting": (best - last[..., :-1]).mean(axis=-1),
            "backward_transfer": (last - just_learned)[..., :-1].mean(axis=-1),
            "forward_transfer": (just_before - first[..., 1:]).mean(axis=-1),
        }


def _resampled_means(
    examples: NDArray[np.float64], weight: NDArray[np.float64], resamples: int, rng: np.random.Generator
) -> NDArray[np.float64]:
    """Weighted means of ``examples`` [stages, examples] over resamples of the examples: [resamples, stages]."""
    n = examples.shape[1]
    weighted = examples * weight
    means = np.empty((resamples, len(examples)))
    for r in range(resamples):
        drawn = np.bincount(rng.integers(n, size=n), minlength=n).astype(float)
        means[r] = weighted @ drawn / (weight @ drawn)
    return means


def _examples(column: Sequence[Any], j: int) -> NDArray[np.float64] | None:
    """Scores of one task's examples [stages, examples], NaN in stages without; None if no stage measured it."""
    arrays = [None if entry is None else np.asarray(entry, dtype=float) for entry in column]
    sizes = {array.shape for array in arrays if array is not None}
    if not sizes:
        return None
    shape = sizes.pop()
    if sizes or len(shape) != 1 or shape[0] == 0:
        raise ValueError(f"task {j} (counted from 0) must have the same test examples, at least one, at every stage")
    return np.stack([np.full(shape, np.nan) if array is None else array for array in arrays])


def _matrix(scores: Scores) -> NDArray[np.float64]:
    """Scores as [T+1, T] float64 with NaN where missing."""
    rows = []
    for t, row in enumerate(scores):
        if not isinstance(row, Sequence | np.ndarray) or isinstance(row, str):
            raise ValueError(f"scores[{t}] must be a row of scores, one a task, not {row!r}")
        rows.append([_number(value, f"scores[{t}][{j}]") for j, value in enumerate(row)])
    _shape([len(row) for row in rows])
    return np.array(rows, dtype=float)


def _shape(widths: list[int]) -> tuple[int, int]:
    """(T+1, T), checked, from the lengths of the rows."""
    explained = "row 0 is before training, row t is after stage t"
    if not widths or widths[0] == 0:
        raise ValueError(f"scores is empty; T tasks need T+1 rows of T scores: {explained}")
    tasks = widths[0]
    for t, width in enumerate(widths):
        if width != tasks:
            raise ValueError(f"scores[{t}] has {width} scores but scores[0] has {tasks}; use None where not measured")
    if len(widths) != tasks + 1:
        raise ValueError(f"scores has {len(widths)} rows; {tasks} tasks need {tasks + 1}: {explained}")
    return tasks + 1, tasks


def _number(value: Any, where: str) -> float:
    if value is None:
        return math.nan
    if not isinstance(value, Real):
        raise ValueError(f"{where} must be a number or None, not {value!r}")
    return float(value)


def _common_scale(metrics: Metrics, tasks: int) -> int | None:
    """1 if higher scores are better for all tasks, -1 if lower ones are; None if scores cannot be averaged."""
    if metrics is None or isinstance(metrics, str):
        names = [metrics] * tasks
    else:
        names = list(metrics.values() if isinstance(metrics, Mapping) else metrics)
        if len(names) != tasks:
            raise ValueError(f"metrics names {len(names)} metrics; it needs one for each of the {tasks} tasks")
    scales = {name if name in LOWER_IS_BETTER else "fraction" for name in names}
    if len(scales) > 1:
        return None
    return 1 if scales == {"fraction"} else -1


def _general_change(general: Mapping[str, Sequence[float | None]], stages: int) -> float | None:
    changes = []
    for name, values in general.items():
        if len(values) != stages:
            raise ValueError(
                f"general[{name!r}] has {len(values)} values; it needs {stages}, one before training first"
            )
        numbers = [_number(value, f"general[{name!r}][{t}]") for t, value in enumerate(values)]
        if not name.startswith(LOWER_IS_BETTER):
            changes.append(numbers[-1] - numbers[0])
    return _finite(np.mean(changes)) if changes else None


def _finite(value: Any) -> float | None:
    return float(value) if np.isfinite(value) else None
