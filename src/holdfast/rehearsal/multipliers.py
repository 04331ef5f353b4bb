"""A constraint on what may be lost, how its loss is estimated, and the dual step of its multiplier."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from holdfast.config.keep import KeepConfig

Floats = NDArray[np.float64]
MOST = 1.0
"""One measurement counts as e budgets at most."""

UNIT = 0.1
"""What a multiplier of 1 is taken to keep at the start: a rise of the loss by a tenth."""

LEAST, MOST_FIRST = 0.01, 10.0
"""The lowest multiplier that is not 0, and the highest one, as a multiple of the first."""


@dataclass(frozen=True)
class Lost:
    """What was lost since the base, by one measurement.

    Attributes:
        value: in nats a token, or as a probability; negative where something was gained.
        error: its standard error over the samples.
        limit: the budget, in the same unit.
    """

    value: float
    error: float
    limit: float

    @property
    def kept(self) -> bool:
        """Whether the value is within the budget."""
        return self.value <= self.limit

    @property
    def interval(self) -> list[float]:
        """95 %, over the samples (normal approximation)."""
        return [self.value - 1.96 * self.error, self.value + 1.96 * self.error]

    def excess(self, margin: float, wider: float = 1.0) -> float:
        """log((value + margin * error) / (wider * limit)), between -``MOST`` and ``MOST``: 0 at the budget; what is not
        finite is beyond it."""
        share = (self.value + margin * self.error) / (wider * self.limit)
        if not math.isfinite(share):
            return MOST
        return -MOST if share <= math.exp(-MOST) else min(math.log(share), MOST)


def loss_rise(before: Floats, now: Floats, tokens: Floats, limit: float) -> Lost:
    """The rise of the mean loss a token; its error is that of a ratio of sums.

    Args:
        before, now: nats of each sample, [samples].
        tokens: supervised tokens of each sample, [samples].
        limit: nats a token.
    """
    rise = now - before
    value = float(rise.sum() / tokens.sum())
    return Lost(value, _error(rise - value * tokens, tokens), limit)


def probability_fall(before: Floats, now: Floats, limit: float) -> Lost:
    """The fall of the mean probability that the model gives the whole answer.

    Args:
        before, now: nats of each answer, [samples].
    """
    fall = np.exp(-before) - np.exp(-now)
    value = float(fall.mean())
    return Lost(value, _error(fall - value, np.ones_like(fall)), limit)


def _error(residuals: Floats, weights: Floats) -> float:
    n = len(residuals)
    return math.inf if n < 2 else float(np.sqrt(n / (n - 1) * (residuals**2).sum()) / weights.sum())


@dataclass
class Multiplier:
    """A multiplier: the weight of the rehearsal of what a constraint is about.

    With the excess g = log(lost / budget) of :meth:`Lost.excess`, the dual step is value <- value * exp(step * g), and
    the weight until the next measurement is value * exp(damping * g). Elenter et al. (2023, arXiv 2310.00154, algorithm
    1) add to the multiplier instead of multiplying it: value <- [value + step * (lost - budget)]_+. The multiplier that
    keeps a budget lies anywhere between 0.01 and 100, since it depends on the loss, the learning rate and the budget,
    so that no added step suits all; this is the exponentiated gradient (Kivinen and Warmuth, 1997). The term with the
    last measurement damps, as that of an augmented Lagrangian does: without it a multiplier answers late, and swings.

    Attributes:
        first: the value at the start of a stage, and where a multiplier of 0 must rise. At most, value and weight are
            ``MOST_FIRST`` times as large: what cannot be kept is not to stop all learning.
        value: below ``LEAST`` it is 0, and nothing is rehearsed.
        weight: what rehearsal is multiplied by.
    """

    first: float
    value: float
    weight: float

    @classmethod
    def start(cls, share: float) -> Multiplier:
        """The multiplier at the start of a stage.

        Args:
            share: what may be lost, as a share of the loss, or a probability.
        """
        first = UNIT / share
        value = first if first >= LEAST else 0.0
        return cls(first, value, value)

    def update(self, excess: float, keep: KeepConfig) -> None:
        """Take a dual step."""
        most = MOST_FIRST * self.first
        if self.value or excess <= 0:
            self.value = min(self.value * math.exp(keep.step * excess), most)
        else:
            self.value = max(self.first, LEAST)
        if self.value < LEAST:
            self.value = 0.0
        self.weight = min(self.value * math.exp(keep.damping * excess), most)
