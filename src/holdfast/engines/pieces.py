"""Which layout a parameter has, and what follows from it."""

from __future__ import annotations

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from holdfast.engines.fsdp2 import Fsdp2
from holdfast.engines.layout import Layout
from holdfast.engines.zero.layout import PARTITIONED, Flattened

DIVIDED = (Fsdp2(), PARTITIONED, Flattened())
"""The layouts of the engines that divide something; whatever is none of them is whole. A new engine is added here."""

WHOLE = Layout()


def layout_of(*parameters: Tensor) -> Layout:
    """The layout of a parameter; of several, that of the first engine that has divided one of them."""
    return next((layout for layout in DIVIDED if any(map(layout.has, parameters))), WHOLE)


def layout_of_model(model: nn.Module) -> Layout:
    """The layout of a model's parameters, trainable or not."""
    return layout_of(*model.parameters())


def prepare_loaded(model: nn.Module) -> None:
    """Make a model that was just loaded ready for its tuner."""
    layout_of_model(model).prepare_loaded(model)


def own_class(module: nn.Module) -> type:
    """The class of a module as it was before an engine put one of its own before it."""
    return next(cls for cls in type(module).__mro__ if not issubclass(cls, FSDPModule))


def reshard(model: nn.Module) -> None:
    """Put away the whole weights that an engine keeps after a forward pass until the backward pass."""
    for layout in DIVIDED:  # weights that are whole for a while do not look divided
        layout.reshard(model)


def gather_own(model: nn.Module) -> None:
    """Make whole what the model's own module holds, before its parts are called by themselves, not by a forward pass.

    Every process must ask for it.
    """
    layout_of_model(model).gather_own(model)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable parameters by name, as they lie between passes through the model."""
    reshard(model)
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def is_divided(model: nn.Module) -> bool:
    """Whether a part of the model lies in pieces, so that processes go through it together or not at all."""
    return layout_of_model(model).divided


def full(t: Tensor) -> Tensor:
    """A parameter in one piece, on its device; every process must ask for it."""
    return layout_of(t).full(t)


def for_compute(p: Tensor) -> Tensor:
    """A parameter to compute with outside its module, in one piece and with gradient; every process must ask for it."""
    return layout_of(p).for_compute(p)
