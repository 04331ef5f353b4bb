"""How DeepSpeed's ZeRO divides weights, gradients and optimizer state among processes, and when it steps.

Nothing here imports DeepSpeed where it is not used: what it has divided is told by what it writes on a parameter.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

if not torch.accelerator.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # accelerate imports DeepSpeed where it is; it would warn of a guess

ENGINE_ATTRIBUTE = "_zero_engine"
"""Where a model keeps a reference to the engine that trains it."""


class Part:
    """This process's part of a parameter: consecutive entries of it, in row-major order.

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

    like = take

    def holds(self, value: Tensor) -> bool:
        """Whether a tensor of the optimizer's state is a part as this one is."""
        return value.shape == (self.length,)

    def join(self, part: Tensor) -> Tensor:
        """The whole tensor of all processes' parts, or of stacks of such; empty but in the main process."""
        rows = part.shape[:-1]
        whole = torch.zeros(*rows, self.shape.numel(), dtype=part.dtype, device=self._device)
        whole.narrow(-1, self.start, self.length).copy_(part)
        dist.reduce(whole, 0)
        return whole.cpu().reshape(*rows, *self.shape) if dist.get_rank() == 0 else torch.empty(0)


def joined(parts: Mapping[str, Part], values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The whole tensors of all processes' parts, in every process, by one all-reduce: of adapters' size, that is."""
    names = list(parts)
    sizes = [parts[name].shape.numel() for name in names]
    first = values[names[0]]
    flat = torch.zeros(sum(sizes), dtype=first.dtype, device=first.device)
    for name, whole in zip(names, flat.split(sizes), strict=True):
        whole.narrow(0, parts[name].start, parts[name].length).copy_(values[name])
    dist.all_reduce(flat)
    return {name: whole.view(parts[name].shape) for name, whole in zip(names, flat.split(sizes), strict=True)}


def is_partitioned(p: Tensor) -> bool:
    """Whether the parameter itself lies in pieces: ZeRO-3."""
    return hasattr(p, "ds_id")


def is_zero_managed(p: Tensor) -> bool:
    """Whether a trainable parameter's weight and gradient, as the optimizer has them, lie in pieces: ZeRO-1 to 3."""
    return hasattr(p, "_hp_mapping") or hasattr(p, "ds_id")


def part(p: Any) -> Part:
    """How a parameter for which :func:`is_zero_managed` holds is divided."""
    if is_partitioned(p):
        size, numel = p.partition_numel(), p.ds_shape.numel()
        start = min(size * dist.get_rank(p.ds_process_group), numel)
        return Part(p.ds_shape, start, min(size, numel - start), p.device)
    held = p._hp_mapping
    start, length = (held.lp_fragment_address.start, held.lp_fragment_address.numel) if held else (0, 0)
    return Part(p.shape, start, length, p.device)


def weight(p: Any) -> Tensor:
    """A live view [length] on this process's part of the weight that the optimizer steps, float32."""
    if is_partitioned(p):
        if not hasattr(p, "_z3_optimizer"):  # between two engines
            return p.ds_tensor.data[: part(p).length]
        return p._z3_optimizer._get_fp32_opt_state_partition(p, False)[0].detach()[: part(p).length]
    return p._hp_mapping.hp_fragment.detach() if p._hp_mapping else torch.empty(0, device=p.device)


def gradient(p: Any) -> Tensor:
    """A live view [length] on this process's part of the mean gradient that the next step uses, float32.

    It holds from the last micro-batch's backward pass to the step: where :func:`before_step` calls.
    """
    if is_partitioned(p):
        return p._z3_optimizer._get_fp32_grad_state_partition(p, False)[0].detach()[: part(p).length]
    if not p._hp_mapping:
        return torch.empty(0, device=p.device)
    return p._hp_mapping.get_lp_grad_fragment(p._index_in_param_group).detach().view(-1)


@contextmanager
def _gathered(parameters: list[Any], modifier_rank: int | None = None) -> Iterator[None]:
    """Within it these parameters, which lie in pieces, are whole; changed only by that process, if one is named."""
    if not parameters:
        yield
        return
    from deepspeed.runtime.zero import GatheredParameters

    _leave(parameters)
    with GatheredParameters(parameters, modifier_rank=modifier_rank):
        yield


def _leave(parameters: Iterable[Any]) -> None:
    """End what the last forward pass left of its use of parameters: a module whose input has no gradient, such as an
    embedding, may not have left, and a pass that was shorter than the recorded one fetches what comes next there."""
    for optimizer in {p._z3_optimizer for p in parameters if hasattr(p, "_z3_optimizer")}:
        optimizer.parameter_offload.get_param_coordinator()._clean_inflight_param_registry()
    for p in parameters:
        p.ds_active_sub_modules.clear()


def whole(p: Any) -> Tensor:
    """A copy of a parameter that lies in pieces, in every process; all must ask for it."""
    with _gathered([p]):
        return p.detach().clone()


class _Copied(torch.autograd.Function):
    """A copy of a parameter that is whole for a moment, and will be again when its gradient comes."""

    @staticmethod
    def forward(ctx: Any, p: Any) -> Tensor:
        ctx.parameter = p
        return p.detach().clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        ctx.parameter.all_gather()
        return gradient


def gathered_with_grad(p: Any) -> Tensor:
    """As :func:`whole`, and gradients go to the parameter; the engine's next step puts it away again."""
    with _gathered([p]):
        return _Copied.apply(p)


@contextmanager
def gathered(model: nn.Module, tensors: Iterable[Tensor]) -> Iterator[None]:
    """Within it these parameters are whole and may be written to, alike in every process; the optimizer follows."""
    with _gathered([t for t in tensors if is_partitioned(t)], modifier_rank=0):
        yield
    if hasattr(optimizer_of(model), "refresh_fp32_params"):
        optimizer_of(model).refresh_fp32_params()


@torch.no_grad()
def sync_weights(model: nn.Module) -> None:
    """After a change of :func:`weight`: bring the model's own parameters up to it, in every process."""
    optimizer = optimizer_of(model)
    if hasattr(optimizer, "update_lp_params"):
        optimizer.update_lp_params()
    elif hasattr(optimizer, "fp16_partitioned_groups_flat"):
        put_away(model)
        for group in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        if kept := optimizer.persistent_parameters:
            kept[0].all_gather(kept)


def put_away(model: nn.Module) -> None:
    """Free the whole weights that ZeRO-3 holds; parameters that a method has added since are not its own."""
    held: list[Any] = [p for p in model.parameters() if is_partitioned(p)]
    _leave(held)
    for p in held:
        p.partition()


def engine_of(model: nn.Module) -> Any:
    reference = model.__dict__.get(ENGINE_ATTRIBUTE)
    return reference() if reference else None


def optimizer_of(model: nn.Module) -> Any:
    return getattr(engine_of(model), "optimizer", None)
