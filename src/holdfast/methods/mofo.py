"""MoFO: in each step only the weights with the largest momentum move, in each tensor by itself."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from holdfast.api.method import Method
from holdfast.api.stage import Step
from holdfast.config.section import Section
from holdfast.engines.process import Process
from holdfast.engines.shards import Shards
from holdfast.engines.vectors import weights

BITS = 31
"""Bits of a float32 that is not negative, whose order is that of the numbers."""


class MoFO(Method):
    """Momentum-filtered optimizer (Chen et al., 2024, arXiv 2407.20999, algorithm 1).

    theta <- theta + FLT(m) * (the optimizer's step), with m its moving average of gradients after the step. FLT(m) is 1
    for the ``fraction`` of a tensor's entries with the largest |m|, and 0 for the others, which stay as they were.
    """

    name = "mofo"
    turn = -4  # before methods that read the weights after a step

    class Options(Section):
        fraction: float = Field(
            0.15, gt=0, le=1, description="alpha, the share of each tensor's weights that move in a step; 1: all"
        )

    options: Options
    before: Shards | None = None
    """The weights before the step under way."""

    @property
    def needs_momentum(self) -> bool:
        return self.options.fraction < 1

    def after_backward(self, step: Step, gradients: Shards) -> dict[str, float]:
        if self.needs_momentum:
            theta = weights(step.stage.model)
            self.before = theta.like({name: t.clone() for name, t in theta.tensors.items()})
        return {}

    @torch.no_grad()
    def after_step(self, step: Step, weights: Shards) -> None:
        if self.before is None:
            return
        sizes = step.momentum()
        sizes = sizes.like({name: m.detach().float().abs() for name, m in sizes.tensors.items()})
        least = kth_largest(sizes, self.options.fraction)
        for name, before in self.before.tensors.items():
            size = sizes.tensors[name]
            before.copy_(torch.where((size >= least[name]) & (size > 0), weights.tensors[name], before))
        weights.copy_(self.before)
        self.before = None


def kth_largest(vector: Shards, fraction: float) -> dict[str, Tensor]:
    """The k-th largest entry of each tensor, with k the share ``fraction`` of its entries, rounded down, at least 1.

    Args:
        vector: float32, no entry below 0. Of tensors that are divided among processes, the entry is that of the whole.
            It is found bit by bit, with one small sum over the processes for each bit and for all of them.

    Returns:
        float32 scalars by name; those of divided tensors lie on the CPU.
    """
    found: dict[str, Tensor] = {}
    divided: list[tuple[str, Tensor]] = []
    wanted: list[int] = []
    for name, t in vector.tensors.items():
        size = vector.pieces[name].shape.numel() if name in vector.pieces else t.numel()
        rank = max(1, int(fraction * size))
        if name in vector.pieces:
            divided.append((name, t.contiguous().view(torch.int32)))
            wanted.append(rank)
        else:
            found[name] = t.flatten().kthvalue(size - rank + 1).values
    if not divided:
        return found
    least = torch.zeros(len(divided), dtype=torch.int64)
    for bit in reversed(range(BITS)):
        higher = least + (1 << bit)
        counts = torch.stack([(bits >= at).sum() for at, (_, bits) in zip(higher.tolist(), divided, strict=True)])
        enough = Process.this().all_reduce_sum(counts.cpu().double()) >= torch.tensor(wanted)
        least = torch.where(enough, higher, least)
    values = least.to(torch.int32).view(torch.float32)
    return found | {name: value for (name, _), value in zip(divided, values, strict=True)}
