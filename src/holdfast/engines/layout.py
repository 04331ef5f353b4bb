"""How an engine lays out parameters and gradients: the contract, and the layout where each process holds them all."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from holdfast.engines.process import Process
from holdfast.errors import ConfigError

ENTRYWISE = ("adamw_torch", "adamw_torch_fused", "rmsprop", "sgd")
"""Optimizers of transformers that step each weight by itself, whatever tensor it lies in."""

MATRIXWISE = ("Adafactor", "AdaLomo", "Muon", "SOAP", "Shampoo")
"""Classes of optimizers, wherever they come from, that look at rows and columns of a weight."""

UNSAVED = ("adamw_torch_4bit", "adamw_torch_8bit")
"""Those that keep their state in tensors of a kind that no checkpoint of ours holds."""


class Piece(Protocol):
    """How one parameter is divided among processes."""

    shape: torch.Size
    """Of the whole parameter."""

    def take(self, whole: Tensor) -> Tensor:
        """This process's piece of a tensor of the parameter's shape."""

    def join(self, piece: Tensor) -> Tensor:
        """The whole tensor of all processes' pieces, or of stacks of such, in every process, on the engine's device."""


class Layout:
    """A kind of parameter: every process holds all of it. An engine that divides parameters overrides what differs.

    Parameters are asked for as they lie between passes through the model. All processes make the same calls in the
    same order.
    """

    divided = False
    """Whether a process lacks a part of the parameter itself, so that processes go through a model together."""

    gathers_for_calls = False
    """Whether the engine makes a module's parameters whole by itself wherever the module is called."""

    saved_by_transformers = True
    """Whether ``save_pretrained`` of transformers makes such parameters whole."""

    averages_all = True
    """Whether the engine averages the gradients of all parameters over processes, and not of its own kind alone."""

    optimizers: tuple[str, ...] | None = None
    """transformers' names of the optimizers that step pieces as they step the whole; None: all do."""

    def has(self, p: Tensor) -> bool:
        """Whether a parameter is of this kind."""
        return True

    def piece(self, p: Any) -> Piece | None:
        """How a parameter is divided, as the optimizer steps it; None where it is whole."""
        return None

    def weight(self, p: Any) -> Tensor:
        """A live view on this process's piece of the weight that the optimizer steps."""
        return p.data

    def gradient(self, p: Any) -> Tensor:
        """A live view on this process's piece of the gradient that the next step uses, zeros where there was none."""
        if p.grad is None:
            p.grad = torch.zeros_like(p)
        return p.grad

    def full(self, p: Any) -> Tensor:
        """A parameter in one piece, on its device."""
        return p

    def for_compute(self, p: Any) -> Tensor:
        """A parameter to compute with outside its module, in one piece and with gradient."""
        return p

    def gradient_of_sum(
        self, losses: Iterable[Tensor], parameters: Mapping[str, nn.Parameter], over_processes: bool
    ) -> dict[str, Tensor]:
        """This process's pieces of the gradient of a sum of scalars at the current weights, float32.

        Accumulated gradients stay as they are.

        Args:
            losses: as many scalars in each process, computed one after the other, so that one graph is held at a time.
            over_processes: each process has scalars of its own, and the sum goes over them too; otherwise all
                processes have the same ones.
        """
        total: dict[str, Tensor] = {}
        for loss in losses:
            found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
            for (name, p), g in zip(parameters.items(), found, strict=True):
                part = torch.zeros_like(p, dtype=torch.float32) if g is None else g.float()
                total[name] = total[name].add_(part) if name in total else part
        if over_processes:
            Process.this().all_reduce_sum_(total.values())
        return total

    def reshard(self, model: nn.Module) -> None:
        """Put away whole weights that the last forward pass left."""

    def gather_own(self, model: nn.Module) -> None:
        """Make whole what the model's own module holds, before its parts are called by themselves."""

    def sync_weights(self, model: nn.Module) -> None:
        """Let a model's own parameters follow after a change of :meth:`weight`."""

    def prepare_loaded(self, model: nn.Module) -> None:
        """Make a model that was just loaded ready for its tuner."""

    def loading(self, model: nn.Module, tensors: Iterable[Tensor]) -> AbstractContextManager[None]:
        """Within it whole values may be copied into these parameters of a model, alike in every process."""
        return nullcontext()

    def check_optimizer(self, name: str) -> None:
        """ConfigError if an optimizer of transformers cannot step such parameters, or not as on one process."""
        if name in UNSAVED:
            raise ConfigError(f"training.optimizer: the state of {name} cannot be saved; adamw_8bit's can")
        if self.optimizers is not None and name not in self.optimizers:
            raise ConfigError(
                f"training.optimizer: {name} cannot step weights that the engine divides among processes; "
                f"{', '.join(self.optimizers)} can, and training.engine: ddp takes any"
            )

    def check_class(self, cls: type) -> None:
        """ConfigError if an optimizer of the user's own is known to need the whole matrices of such parameters."""
        known = [kind.__name__ for kind in cls.__mro__ if kind.__name__ in MATRIXWISE]
        if self.optimizers is not None and known:
            raise ConfigError(
                f"optimizer: {known[0]} needs whole matrices, which the engine divides among processes; AdamW and SGD "
                "do not, and under DDP any optimizer will do"
            )

    def torch_optimizer(self, model: nn.Module, optimizer: Any) -> Any:
        """The torch optimizer of a trainer's optimizer, with ``param_groups`` and ``state`` by the model's parameters.

        Its ``load_state_dict`` takes what :meth:`state_to_load` gives.
        """
        return getattr(optimizer, "optimizer", optimizer)

    def entry(self, value: Any) -> Tensor:
        """A live view on this process's piece of an entry of the optimizer's state, as :meth:`weight` has it."""
        return value

    def state_to_save(self, p: Any, value: Tensor) -> Tensor:
        """The whole tensor of an entry of a parameter's optimizer state, such as a moment."""
        return value

    def state_to_load(self, p: Any, whole: Tensor) -> Tensor:
        """A copy of a whole entry of a parameter's optimizer state, or this process's piece of it."""
        return whole.clone()
