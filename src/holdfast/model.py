"""What holdfast needs to know of a causal language model beyond its forward pass: its head."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Head:
    """How the last hidden state h becomes logits: x = scale * (h W^T + b), then softcap * tanh(x / softcap).

    Attributes:
        weight: [vocab, hidden].
        bias: [vocab] or None.
        softcap: the final soft-capping of Gemma 2, or None.
        scale: what the logits are multiplied with (Cohere, Granite); 1 elsewhere.
    """

    weight: Tensor
    bias: Tensor | None
    softcap: float | None
    scale: float = 1.0

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., hidden] -> [..., vocab]."""
        x = F.linear(hidden, self.weight, self.bias) * self.scale
        return x if self.softcap is None else self.softcap * torch.tanh(x / self.softcap)


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
    return Head(layer.weight, getattr(layer, "bias", None), getattr(config, "final_logit_softcapping", None), scale)


def hidden_only(model: Any) -> dict[str, Any]:
    """Arguments of a forward pass of which only the hidden states are wanted: logits of one position, if it can."""
    takes = "logits_to_keep" in inspect.signature(base(model).forward).parameters
    return {"logits_to_keep": 1} if takes else {}
