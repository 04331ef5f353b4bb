"""A model with dual prefixes, and which of its modules are attention layers."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn

from holdfast.errors import ConfigError
from holdfast.models.attention import FLOAT32
from holdfast.models.cache import cache_name
from holdfast.models.generation import inference
from holdfast.models.head import with_tensors
from holdfast.tuners.dual_prefix.layer import PerTask, PrefixAttention
from holdfast.tuners.prompt_keys import batch_queries, prompt_mask, similarity

"""Names of the parameter by which transformers' attention layers take the cache of their keys and values."""


class DualPrefixModel(BaseTuner):
    """A frozen model with a prefix for each attention layer and, for each task, a key that its prefixes are chosen by.

    Attributes:
        asks: whether outputs in training mode also have ``key_similarity``, float32 [rows]: the cosine of ``key`` and
            the frozen model's mean last hidden state over the tokens before each row's answer, with gradient to the
            key.
        reads_labels: its forward pass reads the labels of each token.
    """

    prefix = "dual_prefix_"
    tuner_layer_cls = PrefixAttention
    asks = False
    reads_labels = True

    @property
    def prefixes(self) -> list[PrefixAttention]:
        """The attention layers with prefixes, in order."""
        return [module for module in self.model.modules() if isinstance(module, PrefixAttention)]

    @property
    def key(self) -> PerTask:
        """The task's key of the active adapter, [hidden]."""
        held = self.prefixes[-1].dual_prefix_task_key
        return held[self.active_adapters[0]]  # type: ignore[return-value]

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        return peft_config  # the target modules depend on the model itself; see _prepare_model

    def _prepare_model(self, peft_config: Any, model: Any) -> None:
        found = attention_layers(model)
        if peft_config.target_modules is None:
            peft_config.target_modules = list(found)
        self._layers = {
            name: layer for name, layer in found.items() if self._check_target_module_exists(peft_config, name)
        }
        most, general = len(self._layers) - 1, peft_config.general_layers
        self._general = min(max(1, len(self._layers) // 6), most) if general is None else general
        if self._general > most >= 0:
            raise ConfigError(
                f"tuner.general_layers: {general} of the model's {len(self._layers)} attention layers leave none for a "
                f"task's own prefixes; {most} would be the most"
            )

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
        if current_key not in self._layers:
            raise ConfigError(
                f"target_modules: {current_key} is a {type(target).__name__}, not the attention of a layer"
            )
        names = list(self._layers)
        shared = names.index(current_key) < self._general
        length = peft_config.general_length if shared else peft_config.expert_length
        hidden = self.model.config.get_text_config().hidden_size if current_key == names[-1] else None
        if isinstance(target, PrefixAttention):
            layer = target
        else:
            found = self._layers[current_key]
            layer = PrefixAttention(target, found.cache, found.shapes)
            self._replace_module(parent, target_name, layer, target)
        layer.update_layer(adapter_name, length, shared, hidden)
        layer.set_adapter(self.active_adapters, inference_mode=peft_config.inference_mode)  # type: ignore[operator]

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """Replace PEFT's version, which needs a layer with a weight. A prefix is made on the attention's device."""
        setattr(parent, child_name, new_module)

    def _check_merge_allowed(self) -> None:
        raise ConfigError(
            "prefixes cannot be merged into the model's weights, since they stand before the input and change no "
            "weight; keep the adapter beside the model, or use unload() to take it off"
        )

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """As PEFT's, and from the names that holdfast 0.1.0 gave."""
        current = {former: now for now, former in _former_names(model, adapter_name).items()}
        named = {current.get(name, name): t for name, t in state_dict.items()}
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, named)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward pass. Positions count a row's own tokens, so that padding on the left does not move the
        prefix away from them."""
        mask, labels = kwargs.get("attention_mask"), kwargs.get("labels")
        if mask is None or mask.dim() != 2:
            return super().forward(*args, **kwargs)
        ids: Any = args[0] if args else kwargs.get("input_ids")
        if kwargs.get("position_ids") is None:
            tokens = (kwargs["inputs_embeds"] if ids is None else ids).shape[1]
            kwargs["position_ids"] = (mask.long().cumsum(1) - 1).clamp(min=0)[:, -tokens:]
        if ids is None or not (self.asks and self.training and labels is not None):
            return super().forward(*args, **kwargs)
        with self.without():
            cosines = similarity(batch_queries(self.model, ids, prompt_mask(mask, labels)), self.key()[None])
        return with_tensors(super().forward(*args, **kwargs), key_similarity=cosines[:, 0])

    @contextmanager
    def without(self) -> Iterator[None]:
        """Turn the prefixes off, so that the model is the frozen one."""
        enabled: list[Any] = [layer for layer in self.prefixes if not layer.disable_adapters]
        try:
            for layer in enabled:
                layer._disable_adapters = True
            yield
        finally:
            for layer in enabled:
                layer._disable_adapters = False

    @property
    def tasks(self) -> int:
        """The number of finished tasks of the active adapter."""
        return len(self.key.past)

    def finish(self) -> None:
        """Keep the key and prefixes of the task in training as those of a finished one; training continues from
        them."""
        for layer in self.prefixes:
            for part in layer.parts():
                part.finish()

    def former_names(self) -> dict[str, str]:
        """The names of holdfast 0.1.0 in a PEFT model, by those now."""
        found = _former_names(self, self.active_adapters[0])
        return {f"base_model.{now}": former for now, former in found.items()}

    @contextmanager
    def using(self, task: int | Tensor) -> Iterator[None]:
        """Use the prefixes of a finished task, numbered from 0, or of one task for each row, int64 [batch]."""
        layers = self.prefixes
        try:
            for layer in layers:
                layer.task = task
            yield
        finally:
            for layer in layers:
                layer.task = None


def _former_names(model: nn.Module, adapter_name: str) -> dict[str, str]:
    """The names that holdfast 0.1.0 gave to what an adapter of this type has in a PEFT model, by their names now."""
    names: dict[str, str] = {}
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, PrefixAttention)]
    for number, (name, layer) in enumerate(layers):
        places = (f"prefixes.{number}.key", f"prefixes.{number}.value", "key")
        for held, place in zip(layer.adapter_layer_names, places, strict=True):
            names |= {
                f"{name}.{held}.{adapter_name}.{part}": f"base_model.{place}.{part}"
                for part in ("now", "past")
                if adapter_name in getattr(layer, held)
            }
    return names


@dataclass
class AttentionLayer:
    """A layer's attention, its name for the cache, and the shapes of keys and values, (heads, dim of a head) each.

    It serves as the layer's cache in one forward pass, to see these shapes.
    """

    module: nn.Module
    cache: str
    shapes: tuple[tuple[int, int], ...] = ()

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.shapes = tuple((part.shape[1], part.shape[3]) for part in (keys, values))
        return keys, values

    def observe(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, kwargs | {self.cache: self}


def attention_layers(model: Any) -> dict[str, AttentionLayer]:
    """The attention of each layer by name, in order: the innermost modules that take a mask and a cache.

    Raises:
        ConfigError: keys and values cannot be put before those of the model's attention.
    """
    implementation = model.config._attn_implementation
    if implementation not in ("eager", "sdpa", FLOAT32):
        raise ConfigError(f"model.attention: prefixes work with eager and sdpa attention, not with {implementation!r}")
    taking: dict[str, AttentionLayer] = {}
    wrapped: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if isinstance(module, PrefixAttention):  # of an adapter that the model has already
            taking[name], wrapped = AttentionLayer(module, module.cache, module.shapes), (*wrapped, f"{name}.")
        elif not name.startswith(wrapped):
            parameters = inspect.signature(module.forward).parameters
            cache = cache_name(module)
            if cache and "attention_mask" in parameters:
                taking[name] = AttentionLayer(module, cache)
    layers = {
        name: layer for name, layer in taking.items() if name and not any(n.startswith(f"{name}.") for n in taking)
    }
    unseen = [layer for layer in layers.values() if not layer.shapes]
    if unseen:
        with ExitStack() as hooks, inference(model):
            for layer in unseen:
                hooks.callback(layer.module.register_forward_pre_hook(layer.observe, with_kwargs=True).remove)
            with suppress(AttributeError):  # a layer that asks its cache for another state than keys and values
                model(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=model.device), use_cache=False)
    if not layers or not all(layer.shapes for layer in layers.values()):
        raise ConfigError(
            f"tuner: prefixes need a model of which every layer has attention that hands its keys and values to a "
            f"cache of transformers; {type(model).__name__} is another"
        )
    return layers
