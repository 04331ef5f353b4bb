"""What holdfast needs to know of a causal language model beyond its forward pass: its head and its context."""

from __future__ import annotations

import inspect
from dataclasses import make_dataclass
from functools import cache
from typing import Any

from torch import Tensor

from holdfast.engines.pieces import for_compute, full
from holdfast.losses.chunked import Head


def base(model: Any) -> Any:
    """The transformers model inside a PEFT model, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def head(model: Any) -> Head:
    """The output head of a causal language model."""
    inner = base(model)
    layer = inner.get_output_embeddings()
    config = inner.config.get_text_config()
    # Cohere multiplies the logits, Granite divides them.
    scale = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1.0)
    bias = getattr(layer, "bias", None)
    bias = None if bias is None else for_compute(bias)
    return Head(for_compute(layer.weight), bias, scale, getattr(config, "final_logit_softcapping", None))


def whole_head(model: Any) -> Head:
    """The head as it is now, in one piece, without gradient."""
    now = head(model)
    bias = None if now.bias is None else full(now.bias.detach())
    return now._replace(weight=full(now.weight.detach()), bias=bias)


def kept_head(model: Any) -> Head | None:
    """A copy of the head as it is now; None where it is not trained, so that it stays as it is."""
    now = head(model)
    if not any(t is not None and t.requires_grad for t in (now.weight, now.bias)):
        return None
    now = whole_head(model)
    return now._replace(weight=now.weight.clone(), bias=None if now.bias is None else now.bias.clone())


def hidden_only(model: Any) -> dict[str, Any]:
    """Arguments of a forward pass of which only the hidden states are wanted: logits of one position, if it can."""
    takes = "logits_to_keep" in inspect.signature(base(model).forward).parameters
    return {"logits_to_keep": 1} if takes else {}


def context(model: Any) -> int | None:
    """Tokens that a model reads at most, where it says so, without the places that soft prompts take."""
    most = getattr(base(model).config.get_text_config(), "max_position_embeddings", None)
    return None if most is None else most - getattr(model, "virtual_tokens", 0)


def begin_token(model: Any) -> int | None:
    """The begin token that a model's configuration names, where it names one."""
    return getattr(base(model).config.get_text_config(), "bos_token_id", None)


def with_tensors(outputs: Any, **tensors: Tensor) -> Any:
    """A model's outputs with further tensors; wrappers such as DDP take outputs apart and make them anew."""
    kind: Any = type(outputs)
    return _with_fields(kind, tuple(tensors))(**outputs, **tensors)


@cache
def _with_fields(outputs: type, names: tuple[str, ...]) -> type:
    return make_dataclass(outputs.__name__, [(name, Tensor | None, None) for name in names], bases=(outputs,))
