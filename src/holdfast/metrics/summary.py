"""What the score matrix says: summary figures, intervals and comparisons, as pure functions on numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from holdfast.metrics.matrix import (
    BY_TASK,
    FIGURES,
    NO_ACCURACY,
    Metrics,
    Scores,
    as_matrix,
    as_number,
    common_scale,
    figures_of,
    finite_or_none,
    metric_signs,
    task_terms,
)


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
    - learned = mean_j ( S[j][j] - S[j-1][j] ); where it is not above its interval, forgetting says nothing
    - forgetting = mean_{j<T} ( max_{j<=t<T} S[t][j] - S[T][j] ); positive is worse
    - backward_transfer = mean_{j<T} ( S[T][j] - S[j][j] ); negative is worse
    - forward_transfer = mean_{j>1} ( S[j-1][j] - S[0][j] ); negative is worse
    - general_change = mean over the accuracy-like measures of general ability of (last - first); negative is worse
    - harmonic_mean = :func:`harmonic_mean` of the mean of the last of these measures and of average; only where there
      is such a measure

    For a metric of which lower is better, differences are taken the other way round, so that their signs keep their
    meaning: forgetting is S[T][j] - min_{j<=t<T} S[t][j]. Nothing is rescaled: percent in, percent out.

    Args:
        scores: T+1 rows of T numbers, nested sequences or an array; None or NaN where not measured.
        metrics: the metric of every task: one for all, T of them, or {task: metric}. Each is a name, of which those in
            ``LOWER_IS_BETTER`` are lower-is-better and all others (and None) higher-is-better, or a scorer, which says.
        general: {measure: T+1 values}; measures whose names begin with one of ``NO_ACCURACY`` do not enter
            general_change and harmonic_mean.

    Returns:
        The figures. A figure is None if a score that it needs is missing or not finite, if it has no terms
        (T = 1: forgetting and both transfers), or if the metrics of the tasks have no common scale: a mean over
        accuracies and losses, or over losses and perplexities, does not exist.

    Raises:
        ValueError: the shape of ``scores``, ``metrics`` or ``general`` is wrong, or an entry is not a number.
    """
    matrix = as_matrix(scores)
    stages, tasks = matrix.shape
    scale = common_scale(metrics, tasks)
    summary = (
        dict.fromkeys(FIGURES)
        if scale is None
        else {k: finite_or_none(v) for k, v in figures_of(matrix, scale).items()}
    )
    accuracies = _accuracies(general or {}, stages)
    if not len(accuracies):
        return summary | {"general_change": None}
    first, last = accuracies[:, 0].mean(), accuracies[:, -1].mean()
    average = summary["average"]
    both = math.nan if average is None or average < 0 or scale == -1 else harmonic_mean(last, average)
    return summary | {"general_change": finite_or_none(last - first), "harmonic_mean": finite_or_none(both)}


def harmonic_mean(general: float, average: float) -> float:
    """What was kept and what was learned in one number, which is low where either is: GeRe's F1 Avg.

    F1 = 2 * general * average / (general + average)

    Args:
        general: an accuracy of general ability after the last stage; GeRe's is that on MMLU.
        average: the mean score of the tasks after it (AP), on the same scale.

    Raises:
        ValueError: one of them is negative; of such numbers there is no harmonic mean.
    """
    if general < 0 or average < 0:
        raise ValueError(f"a harmonic mean is one of numbers from 0, not of {general} and {average}")
    total = general + average
    return 2 * general * average / total if total else 0.0


def by_task(scores: Scores, *, metrics: Metrics = None) -> dict[str, list[float | None]]:
    """What became of each task: the terms of which four figures of :func:`summarize` are the means.

    With T tasks, numbered from 1:

    - learned[j] = S[j][j] - S[j-1][j]
    - forgetting[j] = max_{j<=t<T} S[t][j] - S[T][j], for j < T; positive is worse
    - backward_transfer[j] = S[T][j] - S[j][j], for j < T; negative is worse
    - forward_transfer[j] = S[j-1][j] - S[0][j], for j > 1; negative is worse

    Arguments, errors and the direction of differences are those of :func:`summarize`; since nothing is averaged, each
    task keeps its own scale.

    Returns:
        T values a figure; None where a score that it needs is missing, and for the task that has no term.
    """
    matrix = as_matrix(scores)
    terms = task_terms(matrix, metric_signs(metrics, matrix.shape[1]))
    return {name: [finite_or_none(value) for value in terms[name]] for name in BY_TASK}


def clipped_backward_transfer(scores: Scores, *, metrics: Metrics = None) -> float | None:
    """Backward transfer in which a task's gain does not make up for another's loss; 0 is best.

    clipped = mean_{j<T} min( S[T][j] - S[j][j], 0 )

    TreeLoRA's code reports the same sum divided by T instead of T-1. Arguments and None as in :func:`summarize`.
    """
    matrix = as_matrix(scores)
    T = matrix.shape[1]
    scale = common_scale(metrics, T)
    if scale is None or T == 1:
        return None
    transfer = task_terms(matrix, np.full(T, scale))["backward_transfer"][:-1]
    return finite_or_none(np.minimum(transfer, 0).mean())


def area_under_curve(steps: Sequence[float], scores: Sequence[float]) -> float:
    """Mean score over a stage: the area under its learning curve, by the trapezoidal rule, divided by its length.

    area = 1 / (s_n - s_0) * sum_{k<n} (s_{k+1} - s_k) * (x_k + x_{k+1}) / 2

    for scores x_0, ..., x_n at steps s_0 < ... < s_n. Of two stages that end with the same score the one that came
    there sooner has the better area. (A-GEM's LCA, Chaudhry et al. 2019, is the plain mean over the first few steps.)

    Raises:
        ValueError: fewer than two points, or steps that do not increase.
    """
    s, x = np.asarray(steps, dtype=float), np.asarray(scores, dtype=float)
    if len(s) < 2 or s.shape != x.shape or (np.diff(s) <= 0).any():
        raise ValueError("a curve needs at least two scores, at steps that increase")
    return float(np.trapezoid(x, s) / (s[-1] - s[0]))


def _accuracies(general: Mapping[str, Sequence[float | None]], stages: int) -> NDArray[np.float64]:
    """The values of the accuracy-like measures of general ability, [measures, T+1], NaN where missing."""
    found = []
    for name, values in general.items():
        if len(values) != stages:
            raise ValueError(
                f"general[{name!r}] has {len(values)} values; it needs {stages}, one before training first"
            )
        numbers = [as_number(value, f"general[{name!r}][{t}]") for t, value in enumerate(values)]
        if not name.startswith(NO_ACCURACY):
            found.append(numbers)
    return np.array(found, dtype=float)
