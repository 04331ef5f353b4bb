"""DeepSpeed's engine: its start, its step, and its end."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch import nn

from holdfast.engines.zero.layout import ENGINE_ATTRIBUTE, PARTITIONED, engine_of, put_away


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

    It may change gradients in place: clipping comes after it.
    """
    model, optimizer, step = engine.module, engine.optimizer, engine.step
    model.__dict__[ENGINE_ATTRIBUTE] = weakref.ref(engine)

    def stepped(*args: Any, **kwargs: Any) -> None:
        before_step()
        if hasattr(optimizer, "norm_for_param_grads"):  # with offload taken in the backward pass
            norms = {key: PARTITIONED.gradient(p).norm() for key, p in optimizer.param_dict.items()}
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
