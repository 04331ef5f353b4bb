"""A model with bottleneck adapters, and where they are placed."""

from __future__ import annotations

import inspect
import re
from typing import Any

from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from holdfast.errors import ConfigError
from holdfast.models.kinds import is_seq2seq
from holdfast.tuners.adapter.config import AdapterConfig
from holdfast.tuners.adapter.layer import AdapterLayer

ATTENTION, MLP = "attention|attn", "mlp|ffn|feed_?forward|moe|fc2"
"""Parts of the names of a block's attention and MLP in transformers' models. OPT's blocks have no MLP module, only its
two layers."""


APART = {ATTENTION: ("SelfAttention", "EncDecAttention", "self_attn", "encoder_attn"), MLP: ("DenseReluDense", "fc2")}
"""The names of the same modules in the blocks of sequence-to-sequence models: T5's, and BART's."""


class AdapterModel(BaseTuner):
    """A frozen model with an adapter in each targeted module."""

    prefix = "adapter_"
    tuner_layer_cls = AdapterLayer

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        return peft_config  # the target modules depend on the model itself; see _prepare_model

    def _prepare_model(self, peft_config: Any, model: Any) -> None:
        if peft_config.target_modules is None:
            peft_config.target_modules = placed(model, peft_config.placement)

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
        size = self.model.config.get_text_config().hidden_size
        _check_size(peft_config, _inner(target), current_key, size)
        if isinstance(target, AdapterLayer):
            target.update_layer(adapter_name, peft_config)
            return
        layer = AdapterLayer(target, adapter_name, peft_config, size)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """Replace PEFT's version, which needs a layer with a weight. An adapter is made on the module's device."""
        setattr(parent, child_name, new_module)

    def _check_merge_allowed(self) -> None:
        raise ConfigError(
            "a bottleneck adapter cannot be merged into the model's weights, since its non-linearity stands between "
            "them; keep the adapter beside the model, or use unload() to take it off"
        )


def placed(model: Any, placement: str) -> list[str]:
    """Names of the modules that get an adapter: attention (houlsby only) and MLP of each block.

    A block is a member of the list of modules that is as long as the model is deep. In a sequence-to-sequence model,
    whose encoder and decoder both have blocks, the modules have known names.

    Raises:
        ConfigError: some block has no such module by name.
    """
    if is_seq2seq(model.config):
        return _placed_apart(model, placement)
    depth = model.config.get_text_config().num_hidden_layers
    blocks = {
        f"{name}.{number}": block
        for name, modules in model.named_modules()
        if isinstance(modules, nn.ModuleList) and len(modules) == depth
        for number, block in enumerate(modules)
    }
    wanted = [ATTENTION, MLP] if placement == "houlsby" else [MLP]
    targets = []
    for name, block in blocks.items():
        for pattern in wanted:
            inside = [child for child, module in block.named_children() if re.search(pattern, child) and _fits(module)]
            if not inside:
                raise ConfigError(
                    f"target_modules: {type(model).__name__} has no module in {name} whose name says that it is its "
                    f"{'MLP' if pattern == MLP else 'attention'}; name what gets an adapter, among: "
                    f"{', '.join(child for child, module in block.named_children())}"
                )
            targets += [f"{name}.{child}" for child in inside]
    if not targets:
        raise ConfigError(
            f"target_modules: no list of {depth} blocks is found in {type(model).__name__}; name the modules that get "
            "an adapter"
        )
    return targets


def _placed_apart(model: Any, placement: str) -> list[str]:
    targets = []
    for pattern in (ATTENTION, MLP) if placement == "houlsby" else (MLP,):
        found = [name for name, _ in model.named_modules() if name.rpartition(".")[2] in APART[pattern]]
        if not found:
            raise ConfigError(
                f"target_modules: {type(model).__name__} has no module called {' or '.join(APART[pattern])}; name what "
                "gets an adapter"
            )
        targets += found
    return targets


def _fits(module: nn.Module) -> bool:
    """Whether it is more than a norm, and the block, not the module, adds its output to the residual stream."""
    inner = _inner(module)
    has_matrix = any(p.dim() > 1 for p in inner.parameters())
    return has_matrix and "residual" not in inspect.signature(inner.forward).parameters


def _inner(module: nn.Module) -> Any:
    """The model's module below its adapters."""
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def _check_size(config: AdapterConfig, module: nn.Module, name: str, size: int) -> None:
    if isinstance(module, nn.Linear | Conv1D):
        ways = (module.in_features, module.out_features) if isinstance(module, nn.Linear) else (module.nx, module.nf)
        used = ways if config.placement == "parallel" else ways[1:]
        if set(used) != {size}:
            raise ConfigError(
                f"target_modules: {name} maps {ways[0]} features to {ways[1]}, but an adapter ({config.placement}) "
                f"belongs to modules that {'take and ' if len(used) > 1 else ''}give hidden states, of {size}"
            )
