"""DeepSpeed's engine: its start, its step, and its end."""

from __future__ import annotations

import logging
import os
import socket
import weakref
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import nn

from holdfast.engines.zero.parts import ENGINE_ATTRIBUTE, engine_of, gradient, put_away


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
    model.__dict__[ENGINE_ATTRIBUTE] = weakref.ref(engine)

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
    engine = engine_of(model)
    if engine is None:
        return
    del model.__dict__[ENGINE_ATTRIBUTE]
    if hasattr(engine.optimizer, "parameter_offload"):
        put_away(model)
    engine.destroy()
    engine.destroy = lambda: None  # its __del__ calls it again, when the parameters are another engine's
    engine.module_forward_pre_hook.remove()
    engine.module_forward_post_hook.remove()
    for p in model.parameters():
        for attribute in ("_hp_mapping", "_z3_optimizer"):
            p.__dict__.pop(attribute, None)


def _free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return opened.getsockname()[1]
