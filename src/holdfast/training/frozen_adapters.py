"""Adapters beside the one that is trained: those of methods stay untrained, and TRL's reference ends with its stage."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

from torch import nn


@contextmanager
def frozen_stays(model: nn.Module) -> Iterator[None]:
    """Inside, what is not trained of a model with adapters stays untrained.

    PEFT takes every active adapter for trained, all of it. Whenever adapters were switched off for a moment, as TRL's
    trainers do for the reference of DPO and KTO, it would train those, too, that a method keeps as they are.
    """
    tuner: Any = getattr(model, "base_model", None)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    if not hasattr(model, "peft_config") or not hasattr(tuner, "enable_adapter_layers") or not frozen:
        yield
        return

    def freezing(activate: Any) -> Any:
        @wraps(activate)
        def activated(*args: Any, **kwargs: Any) -> Any:
            result = activate(*args, **kwargs)
            for name, p in model.named_parameters():
                if name in frozen and p.requires_grad:
                    p.requires_grad_(False)
            return result

        return activated

    for verb in ("enable_adapter_layers", "set_adapter"):
        setattr(tuner, verb, freezing(getattr(tuner, verb)))
    try:
        yield
    finally:
        for verb in ("enable_adapter_layers", "set_adapter"):
            delattr(tuner, verb)


REFERENCE = "ref"
"""The adapter in which TRL's trainers of preferences keep the adapter as it was before their stage."""


@contextmanager
def reference_of_this_stage(arguments: Iterable[Any]) -> Iterator[None]:
    """Inside, a trainer is made of these arguments: its reference takes the place of an earlier trainer's.

    TRL refuses a model that has such an adapter already. One that TRL did not make under holdfast stays.
    """
    models: list[Any] = [value for value in arguments if hasattr(value, "peft_config")]
    for model in models:
        if getattr(model, "_holdfast_reference", False):
            del model._holdfast_reference
            if REFERENCE in model.peft_config:
                model.delete_adapter(REFERENCE)
    without = [model for model in models if REFERENCE not in model.peft_config]
    yield
    for model in without:
        if REFERENCE in model.peft_config:
            model._holdfast_reference = True
