"""First steps of every loss: take the unmasked positions, and compute in float32 or wider."""

from __future__ import annotations

import torch
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """x in float32; float64 stays float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def unmasked(x: Tensor, mask: Tensor | None) -> Tensor:
    """The positions of x [..., width] where mask [...] is not zero, or all if it is None: [positions, width]."""
    return x.flatten(end_dim=-2) if mask is None else x[mask.bool()]
