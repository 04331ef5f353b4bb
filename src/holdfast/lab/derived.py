"""Quantities derived from the losses of runs: matched losses, compute multiplier, distance from a front, intervals."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import numpy as np


def loss_at_matched(new: Sequence[float], old: Sequence[float], target: float) -> float | None:
    """Loss on the old domain where a run first reaches a loss on the new one.

    Args:
        new: losses on the new domain, in nats a token, at a run's evaluations in order.
        old: losses on the old domain at the same evaluations.
        target: loss on the new domain.

    Returns:
        The old loss, linearly interpolated in the new loss between two evaluations; None if the run never reaches it.
    """
    place = _first_at_most(new, target)
    if place is None:
        return None
    i, share = place
    return old[i] if share == 1 else (1 - share) * old[i - 1] + share * old[i]


def compute_multiplier(tokens: Sequence[float], losses: Sequence[float], loss: float) -> float:
    """Share of pretraining that sufficed for a loss: what forgetting left of the compute.

    Args:
        tokens: tokens seen at the evaluations of the pretraining run, rising.
        losses: losses on the pretraining domain there, in nats a token.
        loss: the loss on that domain after fine-tuning.

    Returns:
        From 0 to 1, by linear interpolation between evaluations; 1 if pretraining never got that low.
    """
    place = _first_at_most(losses, loss)
    if place is None:
        return 1.0
    i, share = place
    reached = tokens[i] if share == 1 else (1 - share) * tokens[i - 1] + share * tokens[i]
    return reached / tokens[-1]


def above_front(front: Sequence[tuple[float, float]], point: tuple[float, float]) -> float | None:
    """Height of a point above the front that other points form; below 0, it has crossed the front.

    Args:
        front: (loss on the new domain, loss on the old one) of the points that make the front, in any order.
        point: the same pair of the point.

    Returns:
        Its old loss minus the front's, which is linear between neighbours; None outside of the front's new losses.
    """
    xs, ys = zip(*sorted(front), strict=True)
    if not xs[0] <= point[0] <= xs[-1]:
        return None
    return point[1] - float(np.interp(point[0], xs, ys))


def slope(xs: Sequence[float], ys: Sequence[float], held: Sequence[float] | None = None) -> float:
    """Least-squares slope of y over x; with ``held``, of y over x and ``held``: the slope over x at equal ``held``.

    There must be at least as many different points as coefficients.
    """
    columns = [[1.0] * len(xs), xs] + ([] if held is None else [held])
    coefficients, *_ = np.linalg.lstsq(np.array(columns).T, np.array(ys), rcond=None)
    return float(coefficients[1])


def interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float | None]:
    """Mean of independent values, for example of seeds, and the half width of its interval by Student's t.

    Returns:
        (mean, half width); the half width of a single value is None.
    """
    from scipy.stats import t

    n = len(values)
    if n == 1:
        return values[0], None
    half = float(t.ppf((1 + level) / 2, n - 1)) * statistics.stdev(values) / math.sqrt(n)
    return statistics.mean(values), half


def _first_at_most(curve: Sequence[float], target: float) -> tuple[int, float] | None:
    """(i, share): the curve first is at most ``target`` at ``share`` of the way from point i - 1 to point i."""
    for i, value in enumerate(curve):
        if value <= target:
            return i, 1.0 if i == 0 else (curve[i - 1] - target) / (curve[i - 1] - value)
    return None
