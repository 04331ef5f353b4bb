"""A linear layer with LoRA experts and their router."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features
from torch import Tensor, nn
from torch.nn import functional as F

from holdfast.tuners.moe_lora.config import MoeLoraConfig


class Router(nn.Linear):
    """Logits over the experts, float32 [..., experts], without autocast (Switch Transformers, section 2.4)."""

    def forward(self, input: Tensor) -> Tensor:
        with torch.autocast(input.device.type, enabled=False):
            return F.linear(input.float(), self.weight.float())


class MoeLoraLinear(nn.Module, BaseTunerLayer):
    """A linear layer W with mixtures of experts by name. It returns

        W x + alpha / r * sum_i g_i(x) B_i A_i x

    with g of :func:`gates`. Expert i's factors are rows and columns i r / E to (i + 1) r / E of ``moe_lora_A`` [r, in]
    and ``moe_lora_B`` [out, r], so that all experts together take two matrix products. B begins at zero, so that an
    untrained mixture changes nothing. If several mixtures are active, their sum is added.
    """

    adapter_layer_names = ("moe_lora_A", "moe_lora_B", "moe_lora_router")
    other_param_names = ("moe_lora_dropout", "experts", "top_k", "scaling")
    base_layer: nn.Module
    active_adapters: list[str]

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: MoeLoraConfig):
        super().__init__()
        self.base_layer = base_layer
        self.in_features, self.out_features = _get_in_out_features(base_layer)
        self.moe_lora_A, self.moe_lora_B = nn.ModuleDict(), nn.ModuleDict()
        self.moe_lora_router, self.moe_lora_dropout = nn.ModuleDict(), nn.ModuleDict()
        self.experts: dict[str, int] = {}
        self.top_k: dict[str, int | None] = {}
        self.scaling: dict[str, float] = {}
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: MoeLoraConfig) -> None:
        """Add a mixture, on the device and in the data type of the layer."""
        self.moe_lora_A[adapter_name] = nn.Linear(self.in_features, config.r, bias=False)
        self.moe_lora_B[adapter_name] = nn.Linear(config.r, self.out_features, bias=False)
        self.moe_lora_router[adapter_name] = Router(self.in_features, config.experts, bias=False)
        self.moe_lora_dropout[adapter_name] = nn.Dropout(config.lora_dropout)
        if config.init_weights:
            nn.init.zeros_(self.moe_lora_B[adapter_name].weight)  # type: ignore[arg-type]
        self.experts[adapter_name], self.top_k[adapter_name] = config.experts, config.top_k
        self.scaling[adapter_name] = config.lora_alpha / config.r
        self._move_adapter_to_device_of_base_layer(adapter_name)  # type: ignore[operator]
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)  # type: ignore[operator]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Args: x, [..., in]. Returns [..., out], in the layer's data type."""
        result = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return result
        dtype = result.dtype
        for name in self.active_adapters:
            if name in self.moe_lora_A:
                down: Any = self.moe_lora_A[name]
                inputs = self._cast_input_dtype(x, down.weight.dtype)  # type: ignore[operator]
                gate = gates(self.moe_lora_router[name](inputs), self.top_k[name])
                units = down(self.moe_lora_dropout[name](inputs)).unflatten(-1, (self.experts[name], -1))
                units = (units * gate.to(units.dtype)[..., None]).flatten(-2)  # [..., r]
                result = result + self.scaling[name] * self.moe_lora_B[name](units)
        return result.to(dtype)


def gates(logits: Tensor, top_k: int | None) -> Tensor:
    """The experts' shares: softmax over all experts, or over the ``top_k`` highest logits, with 0 for the others.

    With ``top_k`` 1 the share is the expert's probability among all experts (Switch Transformers, equation 2), since a
    softmax over one expert is always 1 and would give the router no gradient from the task.

    Args:
        logits: [..., experts].

    Returns:
        [..., experts], of the same data type.
    """
    if top_k is None:
        return logits.softmax(-1)
    chosen = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, logits.topk(top_k).indices, True)
    if top_k == 1:
        return logits.softmax(-1).masked_fill(~chosen, 0)
    return logits.masked_fill(~chosen, float("-inf")).softmax(-1)
