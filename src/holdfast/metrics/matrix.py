"""A score matrix as an array, its metrics' signs, and each figure's terms."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

LOWER_IS_BETTER = ("loss", "perplexity")
"""Metrics of which lower is better, where they are given by name; measures of general ability begin so."""
NO_ACCURACY = (*LOWER_IS_BETTER, "refusals")
"""How measures of general ability that are no accuracies begin."""

FIGURES = ("average", "new_task", "learned", "forgetting", "backward_transfer", "forward_transfer")
BY_TASK = ("learned", "forgetting", "backward_transfer", "forward_transfer")


class Direction(Protocol):
    """A metric that says which direction is better, as a scorer does."""

    name: str
    lower_is_better: bool


Scores = Sequence[Sequence[float | None]] | NDArray[Any]
Metric = str | Direction
Metrics = Metric | Sequence[Metric] | Mapping[str, Metric] | None
Total = Callable[[NDArray[np.float64]], NDArray[np.float64]]


def figures_of(matrices: NDArray[np.float64], better: int) -> dict[str, NDArray[np.float64]]:
    """The figures of score matrices ``[..., T+1, T]``, each ``[...]``; NaN where a score is missing.

    ``better`` is 1 where higher scores are better and -1 where lower ones are.
    """
    T = matrices.shape[-1]
    terms = task_terms(matrices, np.full(T, better))
    own = np.arange(T)
    figures = {
        "average": matrices[..., T, :].mean(axis=-1),
        "new_task": matrices[..., own + 1, own].mean(axis=-1),
    }
    if T == 1:
        return figures | {name: values[..., 0] for name, values in terms.items()}
    return figures | {
        "learned": terms["learned"].mean(axis=-1),
        "forgetting": terms["forgetting"][..., :-1].mean(axis=-1),
        "backward_transfer": terms["backward_transfer"][..., :-1].mean(axis=-1),
        "forward_transfer": terms["forward_transfer"][..., 1:].mean(axis=-1),
    }


def task_terms(matrices: NDArray[np.float64], signs: NDArray[np.int_]) -> dict[str, NDArray[np.float64]]:
    """The terms of :func:`by_task`, each ``[..., T]``; NaN where a score is missing or there is no term.

    ``signs`` are 1 for the tasks of which higher scores are better and -1 for the others.
    """
    T = matrices.shape[-1]
    gains = signs * matrices
    own = np.arange(T)
    last, just_learned, just_before = gains[..., T, :], gains[..., own + 1, own], gains[..., own, own]
    best = np.full_like(last, np.nan)
    for j in range(T - 1):
        best[..., j] = gains[..., j + 1 : T, j].max(axis=-1)
    with np.errstate(invalid="ignore"):  # the difference of two infinite losses is no number, hence missing
        terms = {
            "learned": just_learned - just_before,
            "forgetting": best - last,
            "backward_transfer": last - just_learned,
            "forward_transfer": just_before - gains[..., 0, :],
        }
    terms["backward_transfer"][..., -1] = np.nan
    terms["forward_transfer"][..., 0] = np.nan
    return terms


def as_matrix(scores: Scores) -> NDArray[np.float64]:
    """Scores as [T+1, T] float64 with NaN where missing."""
    rows = []
    for t, row in enumerate(scores):
        if not isinstance(row, Sequence | np.ndarray) or isinstance(row, str):
            raise ValueError(f"scores[{t}] must be a row of scores, one a task, not {row!r}")
        rows.append([as_number(value, f"scores[{t}][{j}]") for j, value in enumerate(row)])
    matrix_shape([len(row) for row in rows])
    return np.array(rows, dtype=float)


def matrix_shape(widths: list[int]) -> tuple[int, int]:
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


def as_number(value: Any, where: str) -> float:
    if value is None:
        return math.nan
    if not isinstance(value, Real):
        raise ValueError(f"{where} must be a number or None, not {value!r}")
    return float(value)


def scale_of(metric: Metric | None) -> str:
    """What the scores of a metric are: ``fraction``, of which higher is better; otherwise the metric's own name."""
    if metric is None or isinstance(metric, str):
        return metric if metric in LOWER_IS_BETTER else "fraction"
    return metric.name if metric.lower_is_better else "fraction"


def _scales(metrics: Metrics, tasks: int) -> list[str]:
    """The scale of each task's scores."""
    if isinstance(metrics, Mapping):
        metrics = list(metrics.values())
    if isinstance(metrics, str) or not isinstance(metrics, Sequence):
        return [scale_of(metrics)] * tasks
    if len(metrics) != tasks:
        raise ValueError(f"metrics names {len(metrics)} metrics; it needs one for each of the {tasks} tasks")
    return [scale_of(metric) for metric in metrics]


def metric_signs(metrics: Metrics, tasks: int) -> NDArray[np.int_]:
    """[T]: 1 for a task of which higher scores are better, -1 for the others."""
    return np.array([1 if scale == "fraction" else -1 for scale in _scales(metrics, tasks)])


def common_scale(metrics: Metrics, tasks: int) -> int | None:
    """1 if higher scores are better for all tasks, -1 if lower ones are; None if scores cannot be averaged."""
    scales = set(_scales(metrics, tasks))
    if len(scales) > 1:
        return None
    return 1 if scales == {"fraction"} else -1


def finite_or_none(value: Any) -> float | None:
    return float(value) if np.isfinite(value) else None
