"""The head, the context and the begin token of a causal language model."""

from __future__ import annotations

import inspect
from dataclasses import make_dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from torch import Tensor

from holdfast.engines.pieces import for_compute, full
from holdfast.losses.chunked import Head

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


def base(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The transformers model inside a PEFT model, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def head(model: PreTrainedModel | PeftModel) -> Head:
    """The output head of a causal language model."""
    inner = base(model)
    layer = inner.get_output_embeddings()
    config = inner.config.get_text_config()
    # Cohere multiplies the logits, Granite divides them.
    scale = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1.0)
    bias = getattr(layer, "bias", None)
    bias = None if bias is None else for_compute(bias)
    return Head(for_compute(layer.weight), bias, scale, getattr(config, "final_logit_softcapping", None))


def whole_head(model: PreTrainedModel | PeftModel) -> Head:
    """The output head in one piece, without gradient."""
    now = head(model)
    bias = None if now.bias is None else full(now.bias.detach())
    return now._replace(weight=full(now.weight.detach()), bias=bias)


def trained_head(model: PreTrainedModel | PeftModel) -> Head | None:
    """A copy of the head as it is now; None if it is not trained, and so never changes."""
    now = head(model)
    if not any(t is not None and t.requires_grad for t in (now.weight, now.bias)):
        return None
    now = whole_head(model)
    return now._replace(weight=now.weight.clone(), bias=None if now.bias is None else now.bias.clone())


def hidden_only(model: PreTrainedModel | PeftModel) -> dict[str, Any]:
    """Arguments of a forward pass for its hidden states alone: logits of one position only, if the model can do so."""
    takes_tail = "logits_to_keep" in inspect.signature(base(model).forward).parameters
    return {"logits_to_keep": 1} if takes_tail else {}


def context(model: PreTrainedModel | PeftModel) -> int | None:
    """Tokens that a model reads at most, without the places of soft prompts; None if its configuration does not say."""
    most = getattr(base(model).config.get_text_config(), "max_position_embeddings", None)
    return None if most is None else most - getattr(model, "virtual_tokens", 0)


def begin_token(model: PreTrainedModel | PeftModel) -> int | None:
    """The begin token of a model's configuration; None if it names none."""
    return getattr(base(model).config.get_text_config(), "bos_token_id", None)


def with_tensors(outputs: Any, **tensors: Tensor) -> Any:
    """A model's outputs with further fields, which survive wrappers such as DDP that rebuild the outputs."""
    kind: Any = type(outputs)
    return _with_fields(kind, tuple(tensors))(**outputs, **tensors)


@cache
def _with_fields(outputs: type, names: tuple[str, ...]) -> type:
    return make_dataclass(outputs.__name__, [(name, Tensor | None, None) for name in names], bases=(outputs,))
