"""How DeepSpeed's ZeRO divides weights, gradients and optimizer state among processes, and when it steps.

Nothing here imports DeepSpeed where it is not used: what it has divided is told by what it writes on a parameter.
"""

from __future__ import annotations

import logging
import os
import socket
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

if not torch.accelerator.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # accelerate imports DeepSpeed where it is; it would warn of a guess

BUCKET = 1 << 24
"""Entries of gradients that are summed over the processes at a time."""

_ENGINE = "_zero_engine"
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


def lies_here(p: Tensor) -> bool:
    """Whether a trainable parameter's weight and gradient, as the optimizer has them, lie in pieces: ZeRO-1 to 3."""
    return hasattr(p, "_hp_mapping") or hasattr(p, "ds_id")


def part(p: Any) -> Part:
    """How a parameter for which :func:`lies_here` holds is divided."""
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


def followed(p: Any) -> Tensor:
    """As :func:`whole`, and gradients go to the parameter; the engine's next step puts it away again."""
    with _gathered([p]):
        return _Copied.apply(p)


@contextmanager
def loading(model: nn.Module, tensors: Iterable[Tensor]) -> Iterator[None]:
    """Within it these parameters are whole and may be written to, alike in every process; the optimizer follows."""
    with _gathered([t for t in tensors if is_partitioned(t)], modifier_rank=0):
        yield
    if hasattr(_optimizer(model), "refresh_fp32_params"):
        _optimizer(model).refresh_fp32_params()


@torch.no_grad()
def agree(model: nn.Module) -> None:
    """After a change of :func:`weight`: bring the model's own parameters up to it, in every process."""
    optimizer = _optimizer(model)
    if hasattr(optimizer, "update_lp_params"):
        optimizer.update_lp_params()
    elif hasattr(optimizer, "fp16_partitioned_groups_flat"):
        _put_away(model)
        for group in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        if kept := optimizer.persistent_parameters:
            kept[0].all_gather(kept)


def gradient_of_sum(losses: Iterable[Tensor], parameters: Mapping[str, Any], divide: bool) -> dict[str, Tensor]:
    """This process's parts of the gradient of a sum of scalars at the current weights, float32.

    What the engine accumulates stays as it is: its hooks wait for gradients to be accumulated, which these are not.
    No more than :data:`BUCKET` entries, or one tensor, of the whole gradient are held at a time.

    Args:
        losses: as many scalars in each process.
        divide: whether each process has its own scalars, so that the sum goes over the processes too.
    """
    parts = {name: part(p) for name, p in parameters.items()}
    total = {
        name: torch.zeros(parts[name].length, dtype=torch.float32, device=p.device) for name, p in parameters.items()
    }
    held: dict[str, Tensor] = {}

    def empty() -> None:
        if divide and held:
            flat = torch.cat([g.flatten() for g in held.values()])
            dist.all_reduce(flat)
            for (name, g), summed in zip(held.items(), flat.split([g.numel() for g in held.values()]), strict=True):
                held[name] = summed.view_as(g)
        for name, g in held.items():
            total[name] += parts[name].take(g)
        held.clear()

    def take(name: str) -> Callable[[Tensor], Tensor]:
        def hook(g: Tensor) -> Tensor:
            held[name] = g.float()
            if not divide or sum(t.numel() for t in held.values()) >= BUCKET:
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


def begin() -> None:
    """Let accelerate's state say DeepSpeed, on a CPU too, before TrainingArguments that use the configured state.

    A process that no launcher has started is the only one. DeepSpeed's own collectives for a CPU, which it would
    compile, are not used.
    """
    from accelerate.state import AcceleratorState, PartialState

    if "RANK" not in os.environ:
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        os.environ.setdefault("MASTER_PORT", str(_free_port()))
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    for logger in ("DeepSpeed", "accelerate.accelerator"):
        logging.getLogger(logger).addFilter(_is_news)
    AcceleratorState._reset_state(reset_partial_state=True)
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    try:
        PartialState(backend=None if torch.cuda.is_available() else "gloo")
    finally:
        del os.environ["ACCELERATE_USE_DEEPSPEED"]


def load_whole() -> None:
    """Let transformers load the next model whole: after ZeRO-3 it would divide it, without an engine to join it."""
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()


def _is_news(record: logging.LogRecord) -> bool:
    """Whether a warning says more than that the run's own optimizer and accumulation are used, as they should be."""
    return not any(text in record.getMessage() for text in ("untested optimizer", "accumulation steps mismatch"))


def keep_float32(arguments: Any) -> None:
    """Let ``bf16`` of TrainingArguments mean autocast on float32 weights, as on one process; see :func:`autocast`.

    accelerate would turn it into bfloat16 weights, where the DeepSpeed configuration does not speak of it.
    """
    arguments.hf_deepspeed_config.config.setdefault("bf16", {"enabled": False})


def autocast(model: Any) -> None:
    """Let the model's forward pass run in bfloat16 where that is safe, and give float32, as accelerate does it."""
    from accelerate.utils import convert_outputs_to_fp32

    if not hasattr(model, "_original_forward"):
        model._original_forward = model.forward
        cast = torch.autocast(device_type=next(model.parameters()).device.type, dtype=torch.bfloat16)
        model.forward = MethodType(convert_outputs_to_fp32(cast(model.forward.__func__)), model)


class Engine:
    """An engine that accelerate has just made, kept from its ``free_memory``, with which Trainer begins to train.

    Attributes:
        trained: ids of the parameters that it trains.
    """

    def __init__(self, accelerator: Any, trained: set[int]):
        self.trained = trained
        self._accelerator, self._wrapped = accelerator, accelerator.deepspeed_engine_wrapped
        accelerator.deepspeed_engine_wrapped = None

    def resume(self) -> None:
        """Let accelerate know it again."""
        self._accelerator.deepspeed_engine_wrapped = self._wrapped


def attach(engine: Any, before_step: Callable[[], None]) -> None:
    """Let an engine, new, call ``before_step`` between a step's last backward pass and the optimizer's step.

    It may change :func:`gradient` in place: clipping comes after it.
    """
    model, optimizer, step = engine.module, engine.optimizer, engine.step
    model.__dict__[_ENGINE] = weakref.ref(engine)

    def stepped(*args: Any, **kwargs: Any) -> None:
        before_step()
        if hasattr(optimizer, "norm_for_param_grads"):  # with offload taken in the backward pass
            norms = {key: gradient(p).norm() for key, p in optimizer.param_dict.items()}
            optimizer.norm_for_param_grads.update(norms)
        step(*args, **kwargs)
        # ZeRO-3 would take a parameter's last gradient again where it gets none in the next step.
        if hasattr(optimizer, "grad_partitions_flat_buffer"):
            optimizer.grad_partitions_flat_buffer.zero_()
            for flat in optimizer.fp32_partitioned_groups_flat:
                if flat.grad is not None:
                    flat.grad.zero_()

    engine.step = stepped


def release(model: nn.Module) -> None:
    """End a model's engine, if it has one, so that another can take over: parameters keep what they hold."""
    engine = _engine(model)
    if engine is None:
        return
    del model.__dict__[_ENGINE]
    if hasattr(engine.optimizer, "parameter_offload"):
        _put_away(model)
    engine.destroy()
    engine.destroy = lambda: None  # its __del__ calls it again, when the parameters are another engine's
    engine.module_forward_pre_hook.remove()
    engine.module_forward_post_hook.remove()
    for p in model.parameters():
        for attribute in ("_hp_mapping", "_z3_optimizer"):
            p.__dict__.pop(attribute, None)


def _put_away(model: nn.Module) -> None:
    """Free the whole weights that ZeRO-3 holds; parameters that a method has added since are not its own."""
    held: list[Any] = [p for p in model.parameters() if is_partitioned(p)]
    _leave(held)
    for p in held:
        p.partition()


class Unflattened:
    """An engine's torch optimizer, which steps flat tensors, as if it held the model's parameters.

    Attributes:
        param_groups: as a torch optimizer's.
        state: by parameter and kind, live: this process's part [length], or a scalar [].
    """

    def __init__(self, optimizer: Any):
        self._optimizer, self._inner = optimizer, optimizer.optimizer
        if hasattr(optimizer, "fp16_groups"):
            groups: list[list[Any]] = [[] for _ in self._inner.param_groups]
            for number, parameters in enumerate(optimizer.fp16_groups):
                groups[optimizer.sub_group_to_group_id[number]] += parameters
        else:
            groups = optimizer.bit16_groups
        self.param_groups = [
            group | {"params": parameters} for group, parameters in zip(self._inner.param_groups, groups, strict=True)
        ]
        self.state = {p: self._parts(p) for parameters in groups for p in parameters}

    def _parts(self, p: Any) -> dict[str, Any]:
        flat, start = self._place(p)
        return {
            kind: t.narrow(0, start, part(p).length) if isinstance(t, Tensor) and t.shape == flat.shape else t
            for kind, t in self._inner.state[flat].items()
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Put back a state of the form of a torch optimizer's state_dict, whose tensors are this process's parts."""
        parameters = [p for group in self.param_groups for p in group["params"]]
        for group, known in zip(self._inner.param_groups, saved["param_groups"], strict=True):
            group.update({key: value for key, value in known.items() if key != "params"})
        for number, state in saved["state"].items():
            flat, start = self._place(parameters[number])
            kept = self._inner.state[flat]
            for kind, value in state.items():
                if isinstance(value, Tensor) and value.dim():
                    if kind not in kept:
                        kept[kind] = torch.zeros_like(flat, dtype=value.dtype, requires_grad=False)
                    kept[kind].narrow(0, start, len(value)).copy_(value)
                else:
                    kept[kind] = value

    def _place(self, p: Any) -> tuple[Tensor, int]:
        """The flat tensor that is stepped for a parameter, and where this process's part of it begins there."""
        optimizer = self._optimizer
        if is_partitioned(p):
            group, start, _ = optimizer.grad_position[optimizer.get_param_id(p)]
            return optimizer.fp32_partitioned_groups_flat[group], start
        group = next(
            i for i, parameters in enumerate(optimizer.bit16_groups) if any(other is p for other in parameters)
        )
        flat = optimizer.single_partition_of_fp32_groups[group]
        return flat, p._hp_mapping.hp_fragment_address.start if p._hp_mapping else 0


def unflattened(model: nn.Module) -> Unflattened | None:
    """The optimizer of a model's engine, where that steps flat tensors."""
    optimizer = _optimizer(model)
    return Unflattened(optimizer) if hasattr(optimizer, "optimizer") else None


def _engine(model: nn.Module) -> Any:
    reference = model.__dict__.get(_ENGINE)
    return reference() if reference else None


def _optimizer(model: nn.Module) -> Any:
    return getattr(_engine(model), "optimizer", None)


def _free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return opened.getsockname()[1]
