"""An attention layer with prefixes, and the trained tensors that a task has of its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn import functional as F

from holdfast.engines.pieces import full


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


class PrefixAttention(nn.Module, BaseTunerLayer):
    """An attention layer that attends to prefixes by name, and then to its own keys and values. With several active
    prefixes it attends to all of them.

    Attributes:
        dual_prefix_keys: :class:`PerTask` by adapter, [heads, length, dim of a head].
        dual_prefix_values: the same.
        dual_prefix_task_key: :class:`PerTask` by adapter, [hidden], by which a row finds its task; of a model's layers,
            the last one has it.
        cache: the name of the parameter by which the attention layer takes its cache.
        shapes: (heads, dim of a head) of its keys, and of its values.
        task: the finished task that answers, or one for each row of the batch; None: the one in training.
    """

    adapter_layer_names = ("dual_prefix_keys", "dual_prefix_values", "dual_prefix_task_key")
    base_layer: nn.Module
    active_adapters: list[str]

    def __init__(self, base_layer: nn.Module, cache: str, shapes: Sequence[tuple[int, int]]):
        super().__init__()
        self.base_layer, self.cache, self.shapes = base_layer, cache, tuple(shapes)
        self.dual_prefix_keys, self.dual_prefix_values = nn.ModuleDict(), nn.ModuleDict()
        self.dual_prefix_task_key = nn.ModuleDict()
        self._active_adapter: list[str] = []
        self.task: int | Tensor | None = None

    def update_layer(self, adapter_name: str, length: int, shared: bool, hidden: int | None) -> None:
        """Add a prefix of this length, and a task's key of this size where it is given."""
        device = next(self.base_layer.parameters()).device
        parts = (self.dual_prefix_keys, self.dual_prefix_values)
        for (heads, dim), part in zip(self.shapes, parts, strict=True):
            part[adapter_name] = PerTask(heads, length, dim, device=device, shared=shared)
        if hidden is not None:
            self.dual_prefix_task_key[adapter_name] = PerTask(hidden, device=device)

    def parts(self) -> Iterator[PerTask]:
        """What the active adapters have here."""
        for attribute in self.adapter_layer_names:
            held: Any = getattr(self, attribute)
            yield from (held[name] for name in self.active_adapters if name in held)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Give the attention a cache that puts the prefix first, and a mask by which every token attends to it."""
        names = [name for name in self.active_adapters if name in self.dual_prefix_keys]
        if self.disable_adapters or not names:
            return self.base_layer(*args, **kwargs)
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        key, value = (
            self._joined([held[name](self.task) for name in names])
            for held in (self.dual_prefix_keys, self.dual_prefix_values)
        )
        if torch.is_grad_enabled():  # a gradient of zero for the task's key, as engines and PEFT expect one
            for name in self.dual_prefix_task_key.keys() & names:
                value = value + (0 * self.dual_prefix_task_key[name]()).sum()
        former, mask = kwargs.get(self.cache), kwargs.get("attention_mask")
        length, tokens = key.shape[-2], hidden.shape[1]
        if mask is not None:
            mask = F.pad(mask, (length, 0), value=mask.dtype == torch.bool)  # True, or 0 to add: attended to
        elif tokens > 1:  # without a mask the layer would take the prefix for keys of its first tokens
            layer: Any = self.base_layer
            length += 0 if former is None else former.get_seq_length(layer.layer_idx)
            mask = torch.ones(tokens, length + tokens, dtype=torch.bool, device=hidden.device).tril(length)[None, None]
        kwargs |= {self.cache: _Before(key, value, former), "attention_mask": mask}
        return self.base_layer(*args, **kwargs)

    @staticmethod
    def _joined(prefixes: list[Tensor]) -> Tensor:
        """One after the other; [rows, heads, length, dim] where one of them has rows, [heads, length, dim] if not."""
        most = max(prefixes, key=Tensor.dim)
        expanded = [p.expand(*most.shape[:-2], *p.shape[-2:]) for p in prefixes]
        return torch.cat(expanded, dim=-2) if len(expanded) > 1 else expanded[0]


class _Before:
    """Wraps a cache, or none, and puts a prefix before the keys and values that it returns."""

    def __init__(self, key: Tensor, value: Tensor, cache: Any):
        self.key, self.value, self.cache = key, value, cache

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The cache's keys and values, [batch, heads, length of the prefix + tokens, dim of a head]."""
        if self.cache is not None:
            keys, values = self.cache.update(keys, values, *args, **kwargs)
        return _before(self.key, keys), _before(self.value, values)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.cache, name)


def _before(prefix: Tensor, states: Tensor) -> Tensor:
    return torch.cat([prefix.to(states.dtype).expand(len(states), -1, -1, -1), states], dim=2)
