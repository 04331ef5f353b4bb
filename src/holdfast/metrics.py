"""What the score matrix says: summary figures, intervals and comparisons, as pure functions on numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any

import numpy as np
from numpy.typing import NDArray

LOWER_IS_BETTER = ("loss", "perplexity")
NO_ACCURACY = (*LOWER_IS_BETTER, "refusals")
"""How measures of general ability that are no accuracies begin."""

FIGURES = ("average", "new_task", "forgetting", "backward_transfer", "forward_transfer")
BY_TASK = ("forgetting", "backward_transfer", "forward_transfer")

Scores = Sequence[Sequence[float | None]] | NDArray[Any]
Metrics = str | Sequence[str] | Mapping[str, str] | None
Examples = Sequence[Sequence[Sequence[float] | NDArray[Any] | None]]
"""T+1 rows of T entries; an entry holds the scores of a task's test examples, ``[examples]`` in the same order at every
stage, or None where not measured."""
Weights = Sequence[Sequence[float] | NDArray[Any] | None] | None
"""For every task, ``[examples]`` weights of its examples, for example tokens where the metric is a loss per token;
None: all weigh the same."""
Total = Callable[[NDArray[np.float64]], NDArray[np.float64]]
Totals = Sequence[Total | None] | None
"""For every task None, or how its score follows from sums of its examples' statistics, ``[..., k]`` to ``[...]``: for
scores that are no means over examples, such as a macro F1 or a corpus BLEU. Where it is given, a task's entries are
statistics, ``[examples, k]``, in place of scores."""


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
    - harmonic_mean = :func:`harmonic_mean` of the mean of the last of these measures and of average; only where there
      is such a measure

    For a metric of which lower is better, differences are taken the other way round, so that their signs keep their
    meaning: forgetting is S[T][j] - min_{j<=t<T} S[t][j]. Nothing is rescaled: percent in, percent out.

    Args:
        scores: T+1 rows of T numbers, nested sequences or an array; None or NaN where not measured.
        metrics: the metric of every task: one name for all, T names, or {task: name}; names in ``LOWER_IS_BETTER``
            are lower-is-better, all others (and None) higher-is-better.
        general: {measure: T+1 values}; measures whose names begin with one of ``NO_ACCURACY`` do not enter
            general_change and harmonic_mean.

    Returns:
        The figures. A figure is None if a score that it needs is missing or not finite, if it has no terms
        (T = 1: forgetting and both transfers), or if the metrics of the tasks have no common scale: a mean over
        accuracies and losses, or over losses and perplexities, does not exist.

    Raises:
        ValueError: the shape of ``scores``, ``metrics`` or ``general`` is wrong, or an entry is not a number.
    """
    matrix = _matrix(scores)
    stages, tasks = matrix.shape
    scale = _common_scale(metrics, tasks)
    summary = dict.fromkeys(FIGURES) if scale is None else {k: _finite(v) for k, v in _figures(matrix, scale).items()}
    accuracies = _accuracies(general or {}, stages)
    if not len(accuracies):
        return summary | {"general_change": None}
    first, last = accuracies[:, 0].mean(), accuracies[:, -1].mean()
    average = summary["average"]
    both = math.nan if average is None or average < 0 or scale == -1 else harmonic_mean(last, average)
    return summary | {"general_change": _finite(last - first), "harmonic_mean": _finite(both)}


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
    """What became of each task: the terms of which three figures of :func:`summarize` are the means.

    With T tasks, numbered from 1:

    - forgetting[j] = max_{j<=t<T} S[t][j] - S[T][j], for j < T; positive is worse
    - backward_transfer[j] = S[T][j] - S[j][j], for j < T; negative is worse
    - forward_transfer[j] = S[j-1][j] - S[0][j], for j > 1; negative is worse

    Arguments, errors and the direction of differences are those of :func:`summarize`; since nothing is averaged, each
    task keeps its own scale.

    Returns:
        T values a figure; None where a score that it needs is missing, and for the task that has no term.
    """
    matrix = _matrix(scores)
    terms = _terms(matrix, _signs(metrics, matrix.shape[1]))
    return {name: [_finite(value) for value in values] for name, values in terms.items()}


def clipped_backward_transfer(scores: Scores, *, metrics: Metrics = None) -> float | None:
    """Backward transfer in which a task's gain does not make up for another's loss; 0 is best.

    clipped = mean_{j<T} min( S[T][j] - S[j][j], 0 )

    TreeLoRA's code reports the same sum divided by T instead of T-1. Arguments and None as in :func:`summarize`.
    """
    matrix = _matrix(scores)
    T = matrix.shape[1]
    scale = _common_scale(metrics, T)
    if scale is None or T == 1:
        return None
    transfer = _terms(matrix, np.full(T, scale))["backward_transfer"][:-1]
    return _finite(np.minimum(transfer, 0).mean())


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
    the test set, not how much it varies from one training seed to the next: that is :func:`seed_intervals`.

    Args:
        scores: the examples' scores.
        metrics: as in :func:`summarize`.
        weights: of the examples.
        totals: of the tasks whose entries are statistics.
        resamples: how many resamples are drawn.
        seed: the same seed gives the same intervals.

    Returns:
        {figure: [low, high]} for the five figures that come from the score matrix; None for a figure that
        :func:`summarize` would give as None.

    Raises:
        ValueError: a shape is wrong, or a task does not have the same number of examples at every stage.
    """
    return seed_intervals([scores], metrics=metrics, weights=weights, totals=totals, resamples=resamples, seed=seed)


def seed_intervals(
    runs: Sequence[Examples],
    *,
    metrics: Metrics = None,
    weights: Weights = None,
    totals: Totals = None,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, list[float] | None]:
    """95 % intervals of the mean of each figure over runs that differ in their seed: bootstrap over seeds and examples.

    A resample draws test examples as :func:`intervals` does, the same ones for all runs, and n-1 of the n runs with
    replacement: drawing n-1 makes the variance of the mean unbiased, drawing n would make it (n-1)/n of that (Rao and
    Wu 1988). Of few seeds the interval is still rather too narrow than too wide.

    Args:
        runs: the examples' scores of each run; all have the same test examples.

    The rest is as in :func:`intervals`, which is the case of one run.
    """
    matrices = _resampled(runs, weights, totals, resamples, seed)
    scale = _common_scale(metrics, matrices.shape[-1])
    if scale is None:
        return dict.fromkeys(FIGURES)
    chosen = _drawn_runs(len(runs), resamples, seed)
    return {name: _ends(_mean_of(values, chosen)) for name, values in _figures(matrices, scale).items()}


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
    matrices = _resampled([scores], weights, totals, resamples, seed)[0]
    terms = _terms(matrices, _signs(metrics, matrices.shape[-1]))
    return {name: [_ends(column) for column in values.T] for name, values in terms.items()}


def mean_interval(values: Sequence[float], *, resamples: int = 1000, seed: int = 0) -> list[float] | None:
    """95 % interval of a mean over seeds, for a figure of which each run gives one number; None for a single run.

    The runs are drawn as in :func:`seed_intervals`.
    """
    if len(values) < 2:
        return None
    known = np.repeat(np.asarray(values, dtype=float)[:, None], resamples, axis=1)
    return _ends(_mean_of(known, _drawn_runs(len(values), resamples, seed)))


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
        ``difference`` (b less a), ``interval`` [low, high] and ``p``.

    Raises:
        ValueError: the two do not have the same tasks and examples.
    """
    if not a or [len(task) for task in a] != [len(task) for task in b]:
        raise ValueError("a and b must have the same tasks with the same test examples, at least one of each")
    drawn = np.zeros(resamples)
    swapped = np.zeros(permutations)
    difference = 0.0
    for j, pair in enumerate(zip(a, b, strict=True)):
        both, total = _statistics(list(pair), weights, totals, j)
        rng = np.random.default_rng([seed, j])
        difference += _change(both.sum(axis=1), total)
        drawn += _change(_resampled_sums(both, resamples, rng), total)
        first, change = both[0].sum(axis=0), both[1] - both[0]
        change = change[(change != 0).any(axis=1)]  # where nothing differs, it is the same either way round
        whole = both.sum(axis=(0, 1))
        for start in range(0, permutations, 1000):
            part = swapped[start : start + 1000]
            sums = first + rng.integers(0, 2, size=(len(part), len(change)), dtype=np.int8) @ change
            part += _change(np.stack([sums, whole - sums], axis=1), total)
    as_far = np.abs(swapped) >= abs(difference) * (1 - 1e-12)
    return {
        "difference": float(difference / len(a)),
        "interval": _ends(drawn / len(a)),
        "p": float((1 + as_far.sum()) / (1 + permutations)),
    }


def _figures(matrices: NDArray[np.float64], better: int) -> dict[str, NDArray[np.float64]]:
    """The figures of score matrices ``[..., T+1, T]``, each ``[...]``; NaN where a score is missing.

    ``better`` is 1 where higher scores are better and -1 where lower ones are.
    """
    T = matrices.shape[-1]
    terms = _terms(matrices, np.full(T, better))
    own = np.arange(T)
    figures = {
        "average": matrices[..., T, :].mean(axis=-1),
        "new_task": matrices[..., own + 1, own].mean(axis=-1),
    }
    if T == 1:
        return figures | {name: values[..., 0] for name, values in terms.items()}
    return figures | {
        "forgetting": terms["forgetting"][..., :-1].mean(axis=-1),
        "backward_transfer": terms["backward_transfer"][..., :-1].mean(axis=-1),
        "forward_transfer": terms["forward_transfer"][..., 1:].mean(axis=-1),
    }


def _terms(matrices: NDArray[np.float64], signs: NDArray[np.int_]) -> dict[str, NDArray[np.float64]]:
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
            "forgetting": best - last,
            "backward_transfer": last - just_learned,
            "forward_transfer": just_before - gains[..., 0, :],
        }
    terms["backward_transfer"][..., -1] = np.nan
    terms["forward_transfer"][..., 0] = np.nan
    return terms


def _resampled(
    runs: Sequence[Examples], weights: Weights, totals: Totals, resamples: int, seed: int
) -> NDArray[np.float64]:
    """Score matrices of resampled test examples, the same examples in all runs: [runs, resamples, T+1, T]."""
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1, not {resamples}")
    if not runs:
        raise ValueError("there must be at least one run")
    shapes = {_shape([len(row) for row in scores]) for scores in runs}
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
            statistics, total = _statistics(column, weights, totals, j)
            scores = total(_resampled_sums(statistics, resamples, np.random.default_rng([seed, j])))
            matrices[:, :, :, j] = scores.reshape(resamples, len(runs), stages).swapaxes(0, 1)
    return matrices


def _statistics(column: Sequence[Any], weights: Weights, totals: Totals, j: int) -> tuple[NDArray[np.float64], Total]:
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


def _change(sums: NDArray[np.float64], total: Total) -> Any:
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


def _drawn_runs(runs: int, resamples: int, seed: int) -> NDArray[np.int_]:
    """Which runs each resample draws, [max(1, runs - 1), resamples]."""
    return np.random.default_rng(seed).integers(runs, size=(max(1, runs - 1), resamples))


def _mean_of(values: NDArray[np.float64], chosen: NDArray[np.int_]) -> NDArray[np.float64]:
    """Means over the drawn runs of values [runs, resamples]: [resamples]."""
    return np.take_along_axis(values, chosen, axis=0).mean(axis=0)


def _ends(values: NDArray[np.float64]) -> list[float] | None:
    """The ends of a percentile interval over resamples; None if one of them is not known."""
    known = bool(np.isfinite(values).all())
    return [float(v) for v in np.percentile(values, [2.5, 97.5])] if known else None


def _resampled_sums(statistics: NDArray[np.float64], resamples: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Sums of ``statistics`` [entries, examples, k] over resamples of the examples: [resamples, entries, k]."""
    entries, n, k = statistics.shape
    by_example = statistics.swapaxes(0, 1).reshape(n, entries * k)
    sums = np.empty((resamples, entries * k))
    for r in range(resamples):
        sums[r] = np.bincount(rng.integers(n, size=n), minlength=n).astype(float) @ by_example
    return sums.reshape(resamples, entries, k)


def _examples(column: Sequence[Any], j: int, dimensions: int) -> NDArray[np.float64]:
    """What is known of one task's examples, [entries, examples] or [entries, examples, k]; NaN where not measured."""
    arrays = [None if entry is None else np.asarray(entry, dtype=float) for entry in column]
    sizes = {array.shape for array in arrays if array is not None}
    shape = sizes.pop()
    if sizes or len(shape) != dimensions or shape[0] == 0:
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


def _metric_names(metrics: Metrics, tasks: int) -> list[str | None]:
    """The metric of each task."""
    if metrics is None or isinstance(metrics, str):
        return [metrics] * tasks
    names: list[str | None] = list(metrics.values() if isinstance(metrics, Mapping) else metrics)
    if len(names) != tasks:
        raise ValueError(f"metrics names {len(names)} metrics; it needs one for each of the {tasks} tasks")
    return names


def _signs(metrics: Metrics, tasks: int) -> NDArray[np.int_]:
    """[T]: 1 for a task of which higher scores are better, -1 for the others."""
    return np.array([-1 if name in LOWER_IS_BETTER else 1 for name in _metric_names(metrics, tasks)])


def _common_scale(metrics: Metrics, tasks: int) -> int | None:
    """1 if higher scores are better for all tasks, -1 if lower ones are; None if scores cannot be averaged."""
    scales = {name if name in LOWER_IS_BETTER else "fraction" for name in _metric_names(metrics, tasks)}
    if len(scales) > 1:
        return None
    return 1 if scales == {"fraction"} else -1


def _accuracies(general: Mapping[str, Sequence[float | None]], stages: int) -> NDArray[np.float64]:
    """The values of the accuracy-like measures of general ability, [measures, T+1], NaN where missing."""
    found = []
    for name, values in general.items():
        if len(values) != stages:
            raise ValueError(
                f"general[{name!r}] has {len(values)} values; it needs {stages}, one before training first"
            )
        numbers = [_number(value, f"general[{name!r}][{t}]") for t, value in enumerate(values)]
        if not name.startswith(NO_ACCURACY):
            found.append(numbers)
    return np.array(found, dtype=float)


def _finite(value: Any) -> float | None:
    return float(value) if np.isfinite(value) else None
