"""This process's part of a parameter that DeepSpeed's ZeRO divides."""

from __future__ import annotations

import torch
from torch import Tensor
from torch import distributed as dist


class Part:
    """Consecutive entries of a parameter, in row-major order.

    Attributes:
        shape: of the whole parameter.
        start, length: of the part; the length may be 0.
    """

    def __init__(self, shape: torch.Size, start: int, length: int, device: torch.device):
        self.shape, self.start, self.length = shape, start, length
        self._device = device

    def take(self, whole: Tensor) -> Tensor:
        """This process's part [length] of a tensor of the parameter's shape."""
        return whole.reshape(-1).narrow(0, self.start, self.length)

    def join(self, part: Tensor) -> Tensor:
        """The whole tensor of all processes' parts, or of stacks of such, in every process."""
        rows = part.shape[:-1]
        whole = torch.zeros(*rows, self.shape.numel(), dtype=part.dtype, device=self._device)
        whole.narrow(-1, self.start, self.length).copy_(part)
        dist.all_reduce(whole)
        return whole.view(*rows, *self.shape)
