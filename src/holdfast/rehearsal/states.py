"""Activation states in two bits each, and the moments behind their thresholds."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from holdfast.system.device import to_float64


def pack(classes: Tensor) -> Tensor:
    """Put four classes into each byte, the first into its lowest two bits.

    Args:
        classes: [..., hidden], uint8, each below 4.

    Returns:
        [..., ceil(hidden / 4)], uint8, on the same device; unused bits are 0.
    """
    fours = F.pad(classes, (0, -classes.shape[-1] % 4)).unflatten(-1, (-1, 4))
    return fours[..., 0] | fours[..., 1] << 2 | fours[..., 2] << 4 | fours[..., 3] << 6


def unpack(packed: Tensor, hidden: int) -> Tensor:
    """What :func:`pack` was given: [..., hidden], uint8, on the device of ``packed``."""
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8, device=packed.device)
    return (packed.unsqueeze(-1) >> shifts & 3).flatten(-2)[..., :hidden]


class RunningMoments:
    """Mean and standard deviation of each dimension, in one pass over batches of vectors, in float64.

    Each batch's squared deviations are from its own mean, and batches are joined by the parallel update of Chan, Golub
    and LeVeque (1979). So a deviation that is small beside the mean is not lost, unlike in sums of squares.
    """

    def __init__(self) -> None:
        self.count = 0
        self._mean = torch.zeros((), dtype=torch.float64)
        self._deviations = torch.zeros((), dtype=torch.float64)

    def add(self, x: Tensor) -> None:
        """Add vectors [n, hidden] of any floating type; the moments are on their device if it holds float64."""
        if len(x) == 0:
            return
        wide = to_float64(x.detach())
        mean = wide.mean(0)
        self._join(len(x), mean, (wide - mean).square().sum(0))

    def merge(self, other: RunningMoments) -> None:
        """Add all vectors of ``other``."""
        if other.count:
            self._join(other.count, other._mean, other._deviations)

    @property
    def mean(self) -> Tensor:
        """[hidden], float64."""
        assert self.count, "no vector was added"
        return self._mean

    @property
    def std(self) -> Tensor:
        """[hidden], float64; of the population: the squared deviations are divided by ``count``."""
        assert self.count, "no vector was added"
        return (self._deviations / self.count).sqrt()

    def _join(self, count: int, mean: Tensor, deviations: Tensor) -> None:
        if self.count == 0:
            self.count, self._mean, self._deviations = count, mean, deviations
            return
        total = self.count + count
        delta = mean - self._mean
        self._mean = self._mean + delta * (count / total)
        self._deviations = self._deviations + deviations + delta.square() * (self.count * count / total)
        self.count = total
