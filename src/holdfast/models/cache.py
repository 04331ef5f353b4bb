"""The cache of keys and values: its name, and which models read on with it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from holdfast.models.head import base
from holdfast.models.seq2seq import reads_apart

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

NAMES = ("cache", "past_key_values", "layer_past")
"""``cache`` since transformers 5.24, ``past_key_values`` before it."""


def cache_name(module: Any) -> str | None:
    """The argument of a module's forward pass that is its cache; None: it takes none."""
    parameters = inspect.signature(module.forward).parameters
    return next((name for name in NAMES if name in parameters), None)


def cache_of(values: Mapping[str, Any]) -> Any:
    """The cache among a forward pass's arguments or outputs; None: there is none."""
    return next((values[name] for name in NAMES if values.get(name) is not None), None)


def has_plain_decoder(model: PreTrainedModel | PeftModel) -> bool:
    """Whether a step of the decoder alone, with a cache of keys and values, is a step of the whole model."""
    inner = base(model)
    decoder = inner.base_model
    prompts = hasattr(model, "peft_config") and model.active_peft_config.is_prompt_learning
    hooks = inner._forward_pre_hooks or inner._forward_hooks
    parameters = inspect.signature(decoder.forward).parameters
    if (
        reads_apart(model)
        or prompts
        or hooks
        or decoder is inner
        or "position_ids" not in parameters
        or cache_name(decoder) is None
    ):
        return False
    return all(
        type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in DynamicCache(config=inner.config).layers
    )
