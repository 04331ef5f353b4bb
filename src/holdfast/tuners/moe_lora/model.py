"""A model with LoRA experts in its linear layers."""

from __future__ import annotations

from typing import Any

from peft.tuners.tuners_utils import BaseTuner
from torch import nn
from transformers.pytorch_utils import Conv1D

from holdfast.errors import ConfigError
from holdfast.tuners.moe_lora.layer import MoeLoraLinear


class MoeLoraModel(BaseTuner):
    """A frozen model with a router and LoRA experts in each targeted linear layer."""

    prefix = "moe_lora_"
    tuner_layer_cls = MoeLoraLinear

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        return peft_config

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(target, MoeLoraLinear):
            target.update_layer(adapter_name, peft_config)
            return
        if not isinstance(target, nn.Linear | Conv1D):
            raise ConfigError(f"target_modules: {current_key} is a {type(target).__name__}, not a linear layer")
        layer = MoeLoraLinear(target, adapter_name, peft_config)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _check_merge_allowed(self) -> None:
        raise ConfigError(
            "a mixture of LoRA experts cannot be merged into the model's weights, since its router weighs the experts "
            "anew for each token; keep the adapter beside the model, or use unload() to take it off"
        )
