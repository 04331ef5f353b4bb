"""Mixed precision of a model's forward pass: on before a stage's first one, off after its last."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch

FORWARD = ("forward", "_original_forward")
"""Where accelerate puts a forward pass in mixed precision, and the one before it."""


def autocast(model: Any) -> None:
    """Let the model's forward pass run in bfloat16 where that is safe, and give float32, as accelerate does it."""
    from accelerate.utils import convert_outputs_to_fp32

    if not is_mixed(model):
        model._original_forward = model.forward
        cast = torch.autocast(device_type=next(model.parameters()).device.type, dtype=torch.bfloat16)
        function = getattr(model.forward, "__func__", None)
        if function is None:
            model.forward = convert_outputs_to_fp32(cast(model.forward))
        else:
            model.forward = MethodType(convert_outputs_to_fp32(cast(function)), model)


def is_mixed(model: Any) -> bool:
    """Whether a model's forward pass is in mixed precision, whose outputs are float32 but rounded to bfloat16."""
    return hasattr(model, "_original_forward")


@contextmanager
def own_forward_after(model: Any) -> Iterator[None]:
    """At its end the model has the forward pass that it began with: mixed precision is for training alone.

    Otherwise a run that is stopped after a stage would measure other answers than one that is not.
    """
    before = {name: vars(model)[name] for name in FORWARD if name in vars(model)}
    try:
        yield
    finally:
        for name in FORWARD:
            vars(model).pop(name, None)
        vars(model).update(before)
