"""Weights and gradients of a model as vectors (Shards)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from holdfast.engines import zero
from holdfast.engines.pieces import Piece, piece_of, trainable
from holdfast.engines.process import Process
from holdfast.engines.shards import Shards


def weights(model: nn.Module) -> Shards:
    """A live view on the trainable parameters, as the optimizer has them."""
    return _view(
        model, lambda p: zero.weight(p) if zero.is_zero_managed(p) else p.data, lambda: zero.sync_weights(model)
    )


def _view(model: nn.Module, of: Callable[[nn.Parameter], Tensor], written: Callable[[], None] | None = None) -> Shards:
    """A vector of what belongs to each trainable parameter: itself, or its gradient."""
    tensors: dict[str, Tensor] = {}
    pieces: dict[str, Piece] = {}
    for name, p in trainable(model).items():
        t = of(p)
        if (piece := piece_of(p)) is not None:
            pieces[name] = piece
            t = t.to_local() if isinstance(t, DTensor) else t
        tensors[name] = t
    return Shards(tensors, pieces, written)


def snapshot(model: nn.Module) -> Shards:
    """A copy of the trainable parameters as they are, in their own data types, on the CPU."""
    theta = weights(model)
    return theta.like({name: t.to("cpu", copy=True) for name, t in theta.tensors.items()})


@contextmanager
def borrowed(model: nn.Module) -> Iterator[Shards]:
    """A live view on the trainable parameters, which may be changed inside; after, they are as before, bit for bit."""
    theta = weights(model)
    kept = theta.like({name: t.clone() for name, t in theta.tensors.items()})
    try:
        yield theta
    finally:
        theta.copy_(kept)


def gradients(model: nn.Module) -> Shards:
    """A live view on the accumulated gradients; a parameter that got none gets a zero gradient."""

    def gradient(p: nn.Parameter) -> Tensor:
        if zero.is_zero_managed(p):
            return zero.gradient(p)
        if p.grad is None:
            p.grad = torch.zeros_like(p)
        return p.grad

    return _view(model, gradient)


def average_replicated(model: nn.Module) -> None:
    """Average over processes the accumulated gradients of the weights that FSDP2 does not divide, a tuner's own."""
    if any(isinstance(p, DTensor) for p in model.parameters()):
        found, process = gradients(model), Process.this()
        whole = Shards({name: t for name, t in found.tensors.items() if name not in found.pieces})
        whole.all_reduce_().scale_(1 / process.world)


def gradient_of(loss: Tensor, model: nn.Module) -> Shards:
    """The gradient of a scalar at the current weights, float32; accumulated gradients stay as they are.

    The scalar is the same on all processes: each has gone through the same rows.
    """
    return _gradient([loss], model)


def gradient_of_sum(losses: Iterable[Tensor], model: nn.Module) -> Shards:
    """The gradient of the sum over all processes and all their ``losses``, as :func:`gradient_of`.

    Every process gives as many scalars; each is computed when it is asked for, so that one graph is held at a time.
    """
    world = Process.this().world
    if any(map(zero.is_zero_managed, trainable(model).values())):
        return _by_zero(losses, model, divide=True)
    if not any(isinstance(p, DTensor) for p in trainable(model).values()):
        return _gradient(losses, model).all_reduce_()
    return _gradient(losses, model).scale_(world)  # FSDP2 has taken the mean


def gradients_of_sums(groups: Iterable[Iterable[Tensor]], model: nn.Module) -> Shards:
    """A stack of such gradients, one a group of scalars; where all processes hold all of it, by one all-reduce."""
    if any(piece_of(p) for p in trainable(model).values()):
        return Shards.stack([gradient_of_sum(losses, model) for losses in groups])
    return Shards.stack([_gradient(losses, model) for losses in groups]).all_reduce_()


def _gradient(losses: Iterable[Tensor], model: nn.Module) -> Shards:
    """The gradient of the sum of this process's scalars."""
    parameters = trainable(model)
    if any(map(zero.is_zero_managed, parameters.values())):
        return _by_zero(losses, model, divide=False)
    if any(isinstance(p, DTensor) for p in parameters.values()):
        return _gradient_by_backward(losses, model)
    total: dict[str, Tensor] = {}
    for loss in losses:
        found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        for (name, p), g in zip(parameters.items(), found, strict=True):
            part = torch.zeros_like(p, dtype=torch.float32) if g is None else g.float()
            total[name] = total[name].add_(part) if name in total else part
    return Shards(total)


def _by_zero(losses: Iterable[Tensor], model: nn.Module, divide: bool) -> Shards:
    """The same where DeepSpeed's ZeRO divides the parameters."""
    parameters = trainable(model)
    found = zero.gradient_of_sum(losses, parameters, divide)
    return Shards(found, {name: zero.part(p) for name, p in parameters.items()})


def _gradient_by_backward(losses: Iterable[Tensor], model: nn.Module) -> Shards:
    """The same where FSDP2 shards the gradients as they come, in its own backward pass."""
    parameters = trainable(model)
    accumulated = {name: p.grad for name, p in parameters.items()}
    for p in parameters.values():
        p.grad = None
    try:
        for loss in losses:
            loss.backward()
        found = gradients(model)
        return found.like({name: g.float() for name, g in found.tensors.items()})
    finally:
        for name, p in parameters.items():
            p.grad = accumulated[name]
