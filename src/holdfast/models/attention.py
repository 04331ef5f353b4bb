"""Attention in float32 within bfloat16 mixed precision, whose backward pass on a CPU is several times faster."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from holdfast.system.device import on_gpu

FLOAT32 = "sdpa_float32"
"""The name of this attention implementation in transformers."""


def sdpa_float32(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """transformers' ``sdpa`` in float32: [batch, heads, seq, head size] each; the result has the query's data type."""
    if attention_mask is not None and attention_mask.is_floating_point():
        attention_mask = attention_mask.float()
    with torch.autocast(query.device.type, enabled=False):
        output, _ = sdpa_attention_forward(module, query.float(), key.float(), value.float(), attention_mask, **kwargs)
    return output.to(query.dtype), None


AttentionInterface.register(FLOAT32, sdpa_float32)
AttentionMaskInterface.register(FLOAT32, sdpa_mask)


def fastest(precision: str) -> str | None:
    """The fastest attention implementation for training in a precision on this machine; None: the model's own."""
    return FLOAT32 if precision == "bfloat16" and not on_gpu() else None
