"""A tensor that was saved and is read back: of the shape that its reader needs, or a message that names it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

Kind = Literal["numbers", "integers", "counts"]


def saved_tensor(state: Mapping[str, Any], key: str, *shape: int | None, kind: Kind = "numbers") -> Tensor:
    """The tensor of a state.

    Args:
        shape: the size of each dimension; None: any size.
        kind: what it holds: floating-point numbers; integers; or counts, which are integers of at least 0.

    Raises:
        ValueError: it is missing, or of another shape or kind.
    """
    t = state.get(key)
    if not isinstance(t, Tensor):
        raise ValueError(f"{key}: the tensor is missing")
    if t.dim() != len(shape) or any(size not in (None, there) for size, there in zip(shape, t.shape, strict=True)):
        wanted = ", ".join("*" if size is None else str(size) for size in shape)
        raise ValueError(f"{key}: must be of shape [{wanted}], not {list(t.shape)}")
    of_integers = not t.is_floating_point() and not t.is_complex() and t.dtype != torch.bool
    if of_integers == (kind == "numbers") or (kind == "counts" and bool((t < 0).any())):
        raise ValueError(f"{key}: must hold {kind}, not {t.dtype}")
    return t
