"""How ZeRO lays parameters, gradients and the optimizer's weights out.

Nothing here imports DeepSpeed where it is not used: what it has divided is told by what it writes on a parameter.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from holdfast.engines.layout import ENTRYWISE, Layout
from holdfast.engines.zero.gradients import gradient_of_sum
from holdfast.engines.zero.optimizer import Unflattened
from holdfast.engines.zero.parts import Part

if not torch.accelerator.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # accelerate imports DeepSpeed where it is; it would warn of a guess

ENGINE_ATTRIBUTE = "_zero_engine"
"""Where a model keeps a reference to the engine that trains it."""


class Flattened(Layout):
    """ZeRO-1 and 2: the model's weights are whole. The float32 weights that the optimizer steps, and the gradients that
    it steps with, lie in flat tensors, of which each process has a part."""

    optimizers = (*ENTRYWISE, "lion_32bit", "paged_adamw_32bit", "paged_lion_32bit", "rmsprop_bnb_32bit")

    def has(self, p: Tensor) -> bool:
        return hasattr(p, "_hp_mapping")

    def piece(self, p: Any) -> Part:
        held = p._hp_mapping
        start, length = (held.lp_fragment_address.start, held.lp_fragment_address.numel) if held else (0, 0)
        return Part(p.shape, start, length, p.device)

    def weight(self, p: Any) -> Tensor:
        return p._hp_mapping.hp_fragment.detach() if p._hp_mapping else torch.empty(0, device=p.device)

    def gradient(self, p: Any) -> Tensor:
        """It holds from the last micro-batch's backward pass to the optimizer's step."""
        if not p._hp_mapping:
            return torch.empty(0, device=p.device)
        return p._hp_mapping.get_lp_grad_fragment(p._index_in_param_group).detach().view(-1)

    def gradient_of_sum(
        self, losses: Iterable[Tensor], parameters: Mapping[str, nn.Parameter], over_processes: bool
    ) -> dict[str, Tensor]:
        parts = {name: self.piece(p) for name, p in parameters.items()}
        return gradient_of_sum(losses, parameters, parts, over_processes)

    def sync_weights(self, model: nn.Module) -> None:
        if (engine := engine_of(model)) is not None:
            engine.optimizer.update_lp_params()

    @contextmanager
    def loading(self, model: nn.Module, tensors: Iterable[Tensor]) -> Iterator[None]:
        yield
        if (engine := engine_of(model)) is not None:
            engine.optimizer.refresh_fp32_params()

    def torch_optimizer(self, model: nn.Module, optimizer: Any) -> Unflattened:
        zero = engine_of(model).optimizer
        flats = zip(zero.single_partition_of_fp32_groups, zero.bit16_groups, strict=True)
        starts = {p: p._hp_mapping.hp_fragment_address.start if p._hp_mapping else 0 for p in chain(*zero.bit16_groups)}
        places = {p: (flat, starts[p], self.piece(p).length) for flat, group in flats for p in group}
        return Unflattened(zero.optimizer, zero.bit16_groups, places)

    def state_to_save(self, p: Any, value: Tensor) -> Tensor:
        return self.piece(p).join(value) if value.dim() else value

    def state_to_load(self, p: Any, whole: Tensor) -> Tensor:
        return self.piece(p).take(whole) if whole.dim() else whole.clone()


class Partitioned(Flattened):
    """ZeRO-3: the model's weights, of which each process has a part, are made whole for the modules that compute with
    them."""

    divided = True
    gathers_for_calls = True
    saved_by_transformers = False

    def has(self, p: Tensor) -> bool:
        return hasattr(p, "ds_id")

    def piece(self, p: Any) -> Part:
        size, numel = p.partition_numel(), p.ds_shape.numel()
        start = min(size * dist.get_rank(p.ds_process_group), numel)
        return Part(p.ds_shape, start, min(size, numel - start), p.device)

    def weight(self, p: Any) -> Tensor:
        if not hasattr(p, "_z3_optimizer"):  # between two engines
            return p.ds_tensor.data[: self.piece(p).length]
        return p._z3_optimizer._get_fp32_opt_state_partition(p, False)[0].detach()[: self.piece(p).length]

    def gradient(self, p: Any) -> Tensor:
        return p._z3_optimizer._get_fp32_grad_state_partition(p, False)[0].detach()[: self.piece(p).length]

    def full(self, p: Any) -> Tensor:
        with gathered([p]):
            return p.detach().clone()

    def for_compute(self, p: Any) -> Tensor:
        """The engine's next step puts the parameter away again."""
        with gathered([p]):
            return _Copied.apply(p)

    def sync_weights(self, model: nn.Module) -> None:
        if (engine := engine_of(model)) is None:
            return
        put_away(model)
        for group in range(len(engine.optimizer.fp16_groups)):
            engine.optimizer._reassign_or_swap_out_partitioned_parameters(group)
        if persistent := engine.optimizer.persistent_parameters:
            persistent[0].all_gather(persistent)

    @contextmanager
    def loading(self, model: nn.Module, tensors: Iterable[Tensor]) -> Iterator[None]:
        with super().loading(model, tensors), gathered([t for t in tensors if self.has(t)], modifier_rank=0):
            yield

    def torch_optimizer(self, model: nn.Module, optimizer: Any) -> Unflattened:
        zero = engine_of(model).optimizer
        groups: list[list[Any]] = [[] for _ in zero.optimizer.param_groups]
        for number, parameters in enumerate(zero.fp16_groups):
            groups[zero.sub_group_to_group_id[number]] += parameters
        places = {}
        for p in chain(*groups):
            number, start, _ = zero.grad_position[zero.get_param_id(p)]
            places[p] = zero.fp32_partitioned_groups_flat[number], start, self.piece(p).length
        return Unflattened(zero.optimizer, groups, places)


PARTITIONED = Partitioned()


@contextmanager
def gathered(parameters: list[Any], modifier_rank: int | None = None) -> Iterator[None]:
    """Within it these parameters of ZeRO-3 are whole; only process ``modifier_rank``, if one is named, changes them."""
    if not parameters:
        yield
        return
    from deepspeed.runtime.zero import GatheredParameters

    _leave(parameters)
    with GatheredParameters(parameters, modifier_rank=modifier_rank):
        yield


def put_away(model: nn.Module) -> None:
    """Free the whole weights that ZeRO-3 holds; parameters that a method has added since are not its own."""
    held: list[Any] = [p for p in model.parameters() if PARTITIONED.has(p)]
    _leave(held)
    for p in held:
        p.partition()


def _leave(parameters: Iterable[Any]) -> None:
    """Tell ZeRO-3 that no module uses these parameters any more.

    A module whose input has no gradient, such as an embedding, may not have left; and after a pass that was shorter
    than the recorded one, what comes next there may still be fetched.
    """
    for optimizer in {p._z3_optimizer for p in parameters if hasattr(p, "_z3_optimizer")}:
        optimizer.parameter_offload.get_param_coordinator()._clean_inflight_param_registry()
    for p in parameters:
        p.ds_active_sub_modules.clear()


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


def engine_of(model: nn.Module) -> Any:
    """The DeepSpeed engine that trains a model; None where there is none."""
    reference = model.__dict__.get(ENGINE_ATTRIBUTE)
    return reference() if reference else None
