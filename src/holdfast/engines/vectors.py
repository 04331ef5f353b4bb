"""Weights and gradients of a model as vectors (Shards)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from holdfast.engines.layout import Piece
from holdfast.engines.pieces import WHOLE, layout_of, layout_of_model, trainable
from holdfast.engines.process import Process
from holdfast.engines.shards import Shards
from holdfast.errors import ConfigError


def weights(model: nn.Module) -> Shards:
    """A live view on the trainable parameters, as the optimizer has them."""
    parameters = trainable(model)
    tensors = {name: layout_of(p).weight(p) for name, p in parameters.items()}
    layout = layout_of(*parameters.values())
    return Shards(tensors, _pieces(parameters), lambda: layout.sync_weights(model))


def _pieces(parameters: Mapping[str, nn.Parameter]) -> dict[str, Piece]:
    """How the divided ones among these parameters are divided, by name."""
    pieces = {name: layout_of(p).piece(p) for name, p in parameters.items()}
    return {name: piece for name, piece in pieces.items() if piece is not None}


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
    parameters = trainable(model)
    return Shards({name: layout_of(p).gradient(p) for name, p in parameters.items()}, _pieces(parameters))


def momentum(model: nn.Module, optimizer: Any) -> Shards:
    """A live view on the optimizer's moving average of the gradients: AdamW's first moment, or SGD's momentum.

    A parameter that never got a gradient has a momentum of zeros.

    Raises:
        ConfigError: the optimizer has none.
    """
    parameters, state = trainable(model), layout_of_model(model).torch_optimizer(model, optimizer).state
    kinds = {kind for entries in state.values() for kind in entries}
    kind = next((kind for kind in ("exp_avg", "momentum_buffer") if kind in kinds), None)
    if kind is None:
        raise ConfigError(
            "training.optimizer: it keeps no moving average of the gradients, which a method needs (mofo); "
            "adamw_torch, or sgd with training.arguments.optim_args: momentum=0.9, would do"
        )
    tensors = {}
    for name, p in parameters.items():
        found = state.get(p, {}).get(kind)
        tensors[name] = torch.zeros_like(layout_of(p).weight(p)) if found is None else layout_of(p).entry(found)
    return Shards(tensors, _pieces(parameters))


def average_replicated(model: nn.Module) -> None:
    """Average over processes the accumulated gradients of weights that the engine does not average, a tuner's own."""
    if not layout_of_model(model).averages_all:
        found = gradients(model)
        whole = Shards({name: t for name, t in found.tensors.items() if name not in found.pieces})
        whole.all_reduce_().scale_(1 / Process.this().world)


def gradient_of(loss: Tensor, model: nn.Module) -> Shards:
    """The gradient of a scalar at the current weights, float32; accumulated gradients stay as they are.

    The scalar is the same on all processes: each has gone through the same rows.
    """
    return _gradient_of_sum([loss], model, over_processes=False)


def gradient_of_sum(losses: Iterable[Tensor], model: nn.Module) -> Shards:
    """The gradient of the sum over all processes and all their ``losses``, as :func:`gradient_of`.

    Every process gives as many scalars; each is computed when it is asked for, so that one graph is held at a time.
    """
    return _gradient_of_sum(losses, model, over_processes=True)


def gradients_of_sums(groups: Iterable[Iterable[Tensor]], model: nn.Module) -> Shards:
    """A stack of such gradients, one a group of scalars; where all processes hold all of it, by one all-reduce."""
    divided = layout_of(*trainable(model).values()) is not WHOLE
    stack = Shards.stack([_gradient_of_sum(losses, model, over_processes=divided) for losses in groups])
    return stack if divided else stack.all_reduce_()


def _gradient_of_sum(losses: Iterable[Tensor], model: nn.Module, over_processes: bool) -> Shards:
    parameters = trainable(model)
    found = layout_of(*parameters.values()).gradient_of_sum(losses, parameters, over_processes)
    return Shards(found, _pieces(parameters))
