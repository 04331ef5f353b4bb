"""How each parameter is divided among processes, and its whole tensor where one is needed."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from holdfast.engines import zero


class Piece(Protocol):
    """How a parameter is divided among processes."""

    shape: torch.Size
    """Of the whole parameter."""

    def take(self, whole: Tensor) -> Tensor:
        """This process's piece of a tensor of the parameter's shape."""

    def join(self, piece: Tensor) -> Tensor:
        """The whole tensor, of every process's piece, on the CPU; on every process but the main one it may be empty."""


class _Sharded:
    """A piece of a parameter that FSDP2 shards."""

    def __init__(self, parameter: DTensor):
        self.shape = parameter.shape
        self._stride = parameter.stride()
        self._mesh, self._placements = parameter.device_mesh, parameter.placements

    def take(self, whole: Tensor) -> Tensor:
        return self.like(whole).to_local()

    def like(self, whole: Tensor) -> DTensor:
        """A tensor that is divided as the parameter is, such as its optimizer's state."""
        return distribute_tensor(whole.to(self._mesh.device_type), self._mesh, self._placements, src_data_rank=None)

    def holds(self, value: Tensor) -> bool:
        """Whether a tensor of the optimizer's state is divided as the parameter is."""
        return value.shape == self.shape

    def join(self, piece: Tensor) -> Tensor:
        if piece.dim() > len(self.shape):
            return torch.stack([self.join(row) for row in piece])
        local = piece.to(self._mesh.device_type)
        joined = DTensor.from_local(
            local, self._mesh, self._placements, run_check=False, shape=self.shape, stride=self._stride
        )
        return joined.full_tensor().cpu()


def piece_of(p: Tensor) -> _Sharded | zero.Part | None:
    """How a parameter is divided; None where it is whole."""
    if zero.is_zero_managed(p):
        return zero.part(p)
    return _Sharded(p) if isinstance(p, DTensor) else None


def reshard(model: nn.Module) -> None:
    """Let FSDP2 put away the whole weights that it keeps after a forward pass until the backward pass."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable parameters by name, as they lie between passes through the model."""
    reshard(model)
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def is_divided(model: nn.Module) -> bool:
    """Whether a part of the model lies in pieces, so that processes go through it together or not at all."""
    return any(isinstance(p, DTensor) or zero.is_partitioned(p) for p in model.parameters())


def full(t: Tensor) -> Tensor:
    """A parameter in one piece, on its device; every process must ask for it."""
    if zero.is_partitioned(t):
        return zero.whole(t)
    return t.full_tensor() if isinstance(t, DTensor) else t


def for_compute(p: Tensor) -> Tensor:
    """A parameter to compute with outside its module, in one piece and with gradient; every process must ask for it."""
    return zero.gathered_with_grad(p) if zero.is_partitioned(p) else p
