"""Gradients of losses outside DeepSpeed's own backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from holdfast.engines.process import Process
from holdfast.engines.zero.parts import Part

BUCKET = 1 << 24
"""Entries of gradients that are summed over the processes at a time."""


def gradient_of_sum(
    losses: Iterable[Tensor], parameters: Mapping[str, Any], parts: Mapping[str, Part], over_processes: bool
) -> dict[str, Tensor]:
    """This process's parts of the gradient of a sum of scalars: see ``Layout.gradient_of_sum``.

    What the engine accumulates stays as it is: its hooks wait for gradients to be accumulated, which these are not.
    No more than :data:`BUCKET` entries, or one tensor, of the whole gradient are held at a time.
    """
    total = {
        name: torch.zeros(parts[name].length, dtype=torch.float32, device=p.device) for name, p in parameters.items()
    }
    held: dict[str, Tensor] = {}

    def empty() -> None:
        if over_processes:
            Process.this().all_reduce_sum_(held.values())
        for name, g in held.items():
            total[name] += parts[name].take(g)
        held.clear()

    def take(name: str) -> Callable[[Tensor], Tensor]:
        def hook(g: Tensor) -> Tensor:
            held[name] = g.to(torch.float32, copy=over_processes)  # which is summed in place
            if not over_processes or sum(t.numel() for t in held.values()) >= BUCKET:
                empty()
            return g.new_zeros(()).expand(g.shape)

        return hook

    hooks = [p.register_hook(take(name)) for name, p in parameters.items()]
    try:
        for loss in losses:
            torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
            empty()
            for optimizer in {p._z3_optimizer for p in parameters.values() if hasattr(p, "_z3_optimizer")}:
                optimizer.backward_epilogue()
    finally:
        for hook in hooks:
            hook.remove()
    return total
