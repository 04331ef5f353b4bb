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
    return means_of(task_terms(matrices, np.full(matrices.shape[-1], better)))


def means_of(terms: dict[str, NDArray[np.float64]]) -> dict[str, NDArray[np.float64]]:
    """The figures, each ``[...]``, from their terms ``[..., T]``; NaN where there is no term."""
    T = terms["average"].shape[-1]
    parts = {"forgetting": slice(-1), "backward_transfer": slice(-1), "forward_transfer": slice(1, None)}
    return {
        name: values[..., 0] if T == 1 else values[..., parts.get(name, slice(None))].mean(axis=-1)
        for name, values in terms.items()
    }


def task_terms(matrices: NDArray[np.float64], signs: NDArray[np.int_]) -> dict[str, NDArray[np.float64]]:
    """The terms of all figures, each ``[..., T]``; NaN where a score is missing or there is no term.

    ``signs`` are 1 for the tasks of which higher scores are better and -1 for the others.
    """
    T = matrices.shape[-1]
    terms = {name: np.full((*matrices.shape[:-2], T), np.nan) for name in FIGURES}
    for j in range(T):
        for name, values in column_terms(matrices[..., needed_rows(j, T), j], j, T, int(signs[j])).items():
            terms[name][..., j] = values
    return terms


def needed_rows(j: int, tasks: int) -> list[int]:
    """The rows of the score matrix, in order, whose scores of task j (from 0) enter a figure."""
    return [*([0] if j else []), *range(j, tasks + 1)]


def column_terms(scores: NDArray[np.float64], j: int, tasks: int, sign: int) -> dict[str, NDArray[np.float64]]:
    """What task j (from 0) is in each figure, from its scores in the :func:`needed_rows`, ``[..., rows]``: each
    ``[...]``, without the figures of which it is no part. ``sign`` is 1 where higher scores are better, else -1."""
    gains = sign * scores
    own = 1 if j else 0  # the row before the task's own stage; the last one is the last stage's
    last, just_learned, just_before = gains[..., -1], gains[..., own + 1], gains[..., own]
    with np.errstate(invalid="ignore"):  # the difference of two infinite losses is no number, hence missing
        terms = {"average": scores[..., -1], "new_task": scores[..., own + 1], "learned": just_learned - just_before}
        if j < tasks - 1:
            terms["forgetting"] = gains[..., own + 1 : -1].max(axis=-1) - last
            terms["backward_transfer"] = last - just_learned
        if j:
            terms["forward_transfer"] = just_before - gains[..., 0]
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
