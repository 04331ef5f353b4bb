"""Dual prefixes: trained keys and values before those of each attention layer, some for all tasks, some for one."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import load_peft_weights
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from holdfast.api.tuner import Tuner
from holdfast.config.section import Section
from holdfast.engines.pieces import full
from holdfast.errors import ConfigError
from holdfast.models.generation import inference
from holdfast.models.head import with_tensors
from holdfast.tuners.peft_types import UNKNOWN, register
from holdfast.tuners.prompt_keys import batch_queries, prompt_mask, similarity

CACHES = ("past_key_values", "layer_past")
"""Names of the parameter by which transformers' attention layers take the cache of their keys and values."""


class DualPrefix(Tuner):
    """Prefixes of the attention layers, general ones and a task's own (Wang et al., 2022, arXiv 2204.04799).

    A layer with prefix keys P_K and values P_V attends to [P_K; K] and [P_V; V] (Pre-T in the paper). Every token
    attends to the whole prefix; positions, hidden states and logits are those of the batch's own tokens alone. The
    first layers have general prefixes, the others a task's own. The model itself is frozen.
    """

    name = "dual_prefix"
    folder = "adapter"
    not_merged = "its trained prefixes stand before the input and change no weight"
    lacks = UNKNOWN.format(name=name, module=__name__)

    class Options(Section):
        general_layers: int | None = Field(
            None, ge=0, description="first layers, with general prefixes; where absent, a sixth of them, at least one"
        )
        general_length: int = Field(5, ge=1, description="keys and values of a general prefix")
        expert_length: int = Field(20, ge=1, description="keys and values of a task's own prefix")

    def prepare(self, model: PreTrainedModel) -> PeftModel:
        """Raises ConfigError if the model's attention takes no prefix or has too few layers."""
        return get_peft_model(model, DualPrefixConfig(task_type="CAUSAL_LM", **self.options.model_dump()))

    def load(self, model: Any, folder: Path) -> None:
        set_peft_model_state_dict(model, load_peft_weights(str(folder), device="cpu"))


@dataclass
class DualPrefixConfig(PeftConfig):
    """The tuner's options, as PEFT keeps them."""

    general_layers: int | None = None
    general_length: int = 5
    expert_length: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type: Any = DUAL_PREFIX


class PerTask(nn.Module):
    """A trained tensor and, unless all tasks share it, its value for each finished task.

    Attributes:
        now: the trained tensor, float32.
        past: [tasks, ...], its values for the finished tasks, in their order.
    """

    past: Tensor

    def __init__(self, *shape: int, device: torch.device, shared: bool = False):
        super().__init__()
        start = 0.01 * torch.rand(shape)  # as in DualPrompt's published code; drawn on the CPU on every machine
        self.now, self.shared = nn.Parameter(start.to(device)), shared
        if not shared:
            self.register_buffer("past", self.now.new_empty(0, *shape))

    def forward(self, task: int | Tensor | None = None) -> Tensor:
        """The trained tensor, or that of a finished task; [rows, ...] where ``task`` is one number a row."""
        return self.now.clone() if task is None or self.shared else self.past[task]

    def finish(self) -> None:
        """Keep the trained tensor as that of a finished task; training continues from it."""
        if not self.shared:
            self.past = torch.cat([self.past, full(self.now).detach()[None]])

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if f"{prefix}past" in state_dict:
            self.past = self.past.new_empty(state_dict[f"{prefix}past"].shape)
        super()._load_from_state_dict(state_dict, prefix, *args)


class Prefix(nn.Module, BaseTunerLayer):
    """The keys and values before those of one attention layer, each [heads, length, dim of a head]."""

    def __init__(self, layer: AttentionLayer, length: int, **options: Any):
        super().__init__()
        self.key, self.value = (PerTask(heads, length, dim, **options) for heads, dim in layer.shapes)
        self.task: int | Tensor | None = None
        layer.module.register_forward_pre_hook(partial(self.attend, layer.cache), with_kwargs=True)

    def attend(self, cache: str, layer: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Give the layer a cache that puts the prefix first, and a mask by which every token attends to it."""
        if self.disable_adapters:
            return None
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        key, value = self.key(self.task), self.value(self.task)
        former, mask, length, tokens = kwargs.get(cache), kwargs.get("attention_mask"), key.shape[-2], hidden.shape[1]
        if mask is not None:
            mask = F.pad(mask, (length, 0), value=mask.dtype == torch.bool)  # True, or 0 to add: attended to
        elif tokens > 1:  # without a mask the layer would take the prefix for keys of its first tokens
            length += 0 if former is None else former.get_seq_length(layer.layer_idx)
            mask = torch.ones(tokens, length + tokens, dtype=torch.bool, device=hidden.device).tril(length)[None, None]
        return args, kwargs | {cache: _Before(key, value, former), "attention_mask": mask}


class DualPrefixModel(BaseTuner):
    """A frozen model with a prefix for each attention layer and, for each task, a key that its prefixes are chosen by.

    Attributes:
        prefixes: :class:`Prefix`, one a layer, in order.
        key: :class:`PerTask`, [hidden].
        asks: whether outputs in training mode also have ``key_similarity``, float32 [rows]: the cosine of ``key`` and
            the frozen model's mean last hidden state over the tokens before each row's answer, with gradient to the
            key.
    """

    prefix = "dual_prefix_"

    def inject_adapter(self, model: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        config: Any = self.peft_config[adapter_name]
        layers = attention_layers(model)
        most = len(layers) - 1
        general = min(max(1, len(layers) // 6), most) if config.general_layers is None else config.general_layers
        if general > most:
            raise ConfigError(
                f"tuner.general_layers: {general} of the model's {len(layers)} attention layers leave none for a "
                f"task's own prefixes; {most} would be the most"
            )
        model.requires_grad_(False)
        self.prefixes = nn.ModuleList()
        for number, layer in enumerate(layers):
            length = config.general_length if number < general else config.expert_length
            self.prefixes.append(Prefix(layer, length, device=model.device, shared=number < general))
        self.key = PerTask(model.config.get_text_config().hidden_size, device=model.device)
        self.asks = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward pass. Positions count a row's own tokens, so that padding on the left does not move the
        prefix away from them."""
        mask, labels = kwargs.get("attention_mask"), kwargs.get("labels")
        if mask is None or mask.dim() != 2:
            return super().forward(*args, **kwargs)
        ids: Any = args[0] if args else kwargs.get("input_ids")
        if kwargs.get("position_ids") is None:
            kwargs["position_ids"] = (mask.long().cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        if not (self.asks and self.training and labels is not None):
            return super().forward(*args, **kwargs)
        with self.without():
            cosines = similarity(batch_queries(self.model, ids, prompt_mask(mask, labels)), self.key()[None])
        return with_tensors(super().forward(*args, **kwargs), key_similarity=cosines[:, 0])

    @contextmanager
    def without(self) -> Iterator[None]:
        """Turn the prefixes off, so that the model is the frozen one."""
        enabled = [not prefix.disable_adapters for prefix in self.prefixes]
        self._enable_adapter_layers(False)
        try:
            yield
        finally:
            for prefix, was in zip(self.prefixes, enabled, strict=True):
                prefix.enable_adapters(was)  # type: ignore[operator]

    @property
    def tasks(self) -> int:
        """The number of finished tasks."""
        return len(self.key.past)

    def finish(self) -> None:
        """Keep the key and prefixes of the task in training as those of a finished one; training continues from
        them."""
        for part in self.modules():
            if isinstance(part, PerTask):
                part.finish()

    @contextmanager
    def using(self, task: int | Tensor) -> Iterator[None]:
        """Use the prefixes of a finished task, numbered from 0, or of one task for each row, int64 [batch]."""
        try:
            for prefix in self.prefixes:
                prefix.task = task  # type: ignore[assignment]
            yield
        finally:
            for prefix in self.prefixes:
                prefix.task = None  # type: ignore[assignment]

    def _enable_adapter_layers(self, enabled: bool = True) -> None:
        for prefix in self.prefixes:
            prefix.enable_adapters(enabled)  # type: ignore[operator]

    def _check_merge_allowed(self) -> None:
        raise ConfigError(
            "prefixes cannot be merged into the model's weights, since they stand before the input and change no "
            "weight; keep the adapter beside the model"
        )

    def _create_and_replace(self, *args: Any, **kwargs: Any) -> None:
        raise AssertionError("the model's layers stay as they are")


class _Before:
    """Wraps a cache, or none, and puts a prefix before the keys and values that it returns."""

    def __init__(self, key: Tensor, value: Tensor, cache: Any):
        self.key, self.value, self.cache = key, value, cache

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The cache's keys and values, [batch, heads, length of the prefix + tokens, dim of a head]."""
        if self.cache is not None:
            keys, values = self.cache.update(keys, values, *args, **kwargs)
        return _joined(self.key, keys), _joined(self.value, values)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.cache, name)


def _joined(prefix: Tensor, states: Tensor) -> Tensor:
    return torch.cat([prefix.to(states.dtype).expand(len(states), -1, -1, -1), states], dim=2)


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


def attention_layers(model: Any) -> list[AttentionLayer]:
    """The attention of each layer, in order: the innermost modules that take a mask and a cache.

    Raises:
        ConfigError: keys and values cannot be put before those of the model's attention.
    """
    implementation = model.config._attn_implementation
    if implementation not in ("eager", "sdpa"):
        raise ConfigError(f"model.attention: prefixes work with eager and sdpa attention, not with {implementation!r}")
    taking: dict[str, AttentionLayer] = {}
    for name, module in model.named_modules():
        parameters = inspect.signature(module.forward).parameters
        cache = next((cache for cache in CACHES if cache in parameters), None)
        if cache and "attention_mask" in parameters:
            taking[name] = AttentionLayer(module, cache)
    layers = [layer for name, layer in taking.items() if name and not any(n.startswith(f"{name}.") for n in taking)]
    with ExitStack() as hooks, inference(model):
        for layer in layers:
            hooks.callback(layer.module.register_forward_pre_hook(layer.observe, with_kwargs=True).remove)
        model(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=model.device), use_cache=False)
    if not layers or not all(layer.shapes for layer in layers):
        raise ConfigError(
            f"tuner: prefixes need a model of which every layer has attention that hands its keys and values to a "
            f"cache of transformers; {type(model).__name__} is another"
        )
    return layers


DUAL_PREFIX = register("dual_prefix", DualPrefixConfig, DualPrefixModel)
