"""Gates of LoRA branches: a coefficient for each row and branch, from the embeddings of the row's prompt."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from random import Random
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from holdfast.api.rows import IGNORED, Batch, TokenRow, prompt
from holdfast.engines.pieces import full
from holdfast.errors import ConfigError
from holdfast.models.cache import cache_of
from holdfast.models.head import base
from holdfast.tuners.prompt_keys import before_answer

LAYERS = ("first", "second", "last")
"""A gate's weights: G_1 [hidden, embedding], G_2 [embedding, hidden] and G_3 [1, embedding]."""

RECOMPUTED = "a branch that is computed again in the backward pass would have the coefficients of another micro-batch"
"""Why gates cannot work with gradient checkpointing."""

GateWeights = dict[str, Tensor]
"""Weights by the names of LAYERS, float32."""

SHARPNESS = 4.0
"""What the cosine is multiplied by (the authors' code), so that a gate opens to 0.96."""


def features(gate: Mapping[str, Tensor], pooled: Tensor) -> dict[str, Tensor]:
    """The inputs p_{l-1} of each layer l: p_0 is ``pooled``, and p_l = SiLU(G_l p_{l-1}).

    Args:
        pooled: [rows, embedding].

    Returns:
        by the layer's name, [rows, its inputs].
    """
    with torch.autocast(pooled.device.type, enabled=False):
        hidden = F.silu(pooled @ gate["first"].T.to(pooled.dtype))
        return {"first": pooled, "second": hidden, "last": F.silu(hidden @ gate["second"].T.to(pooled.dtype))}


def coefficients(gate: Mapping[str, Tensor], pooled: Tensor) -> Tensor:
    """a = |2 sigmoid(4 cos(G_3, p_2)) - 1|, between 0 and 1, and 0 where p_2 is orthogonal to G_3: [rows, 1]."""
    keys = features(gate, pooled)["last"]
    with torch.autocast(pooled.device.type, enabled=False):  # so that they are those of test time
        cosine = F.normalize(keys, dim=-1) @ F.normalize(gate["last"].to(keys.dtype), dim=-1).T
        return (2 * torch.sigmoid(SHARPNESS * cosine) - 1).abs()


class Gate(nn.Module):
    """A gate in training."""

    def __init__(self, gate: GateWeights):
        super().__init__()
        for name in LAYERS:
            self.register_parameter(name, nn.Parameter(gate[name].clone()))

    def forward(self, pooled: Tensor) -> Tensor:
        return coefficients(dict(self.named_parameters()), pooled)


def random_gate(width: int, hidden: int, chance: Random) -> GateWeights:
    """A gate whose weights are drawn as those of a linear layer, and in the last layer uniformly from [-1, 1]."""
    generator = torch.Generator().manual_seed(chance.getrandbits(63))

    def uniform(rows: int, columns: int, most: float) -> Tensor:
        return most * (2 * torch.rand(rows, columns, generator=generator) - 1)

    return {
        "first": uniform(hidden, width, 1 / math.sqrt(width)),
        "second": uniform(width, hidden, 1 / math.sqrt(hidden)),
        "last": uniform(1, width, 1.0),
    }


def mean_embedding(embeddings: Tensor, seen: Tensor) -> Tensor:
    """p_0: the mean of embeddings [rows, seq, embedding] over the tokens in ``seen``, float32 [rows, embedding]."""
    weight = seen.float()
    return (embeddings.float() * weight[..., None]).sum(1) / weight.sum(1, keepdim=True)


@torch.no_grad()
def pooled_prompts(
    model: Any, rows: Sequence[TokenRow], collate: Callable[[Sequence[TokenRow]], Batch], batch_size: int
) -> Tensor:
    """p_0 of each row's prompt, float32 [rows, embedding]; every process must ask for it."""
    embedding = base(model).get_input_embeddings()
    weight, scale = full(embedding.weight), getattr(embedding, "embed_scale", 1.0)
    parts = []
    for start in range(0, len(rows), batch_size):
        prompts = [prompt(row) for row in rows[start : start + batch_size]]
        batch = collate([{"input_ids": ids, "labels": [IGNORED] * len(ids)} for ids in prompts])
        parts.append(mean_embedding(F.embedding(batch["input_ids"], weight) * scale, batch["attention_mask"]))
    return torch.cat(parts)


class Gating:
    """Hooks on a model with LoRA adapters that multiply each branch by its coefficient, row by row.

    A row's coefficients follow from its prompt: the tokens before the first supervised one where the forward pass has
    labels; otherwise those that ``lengths`` names, or all. Where tokens continue a cache, they are those of the
    pass before.

    Attributes:
        gates: of each branch, in order.
        lengths: tokens of a row before its answer, by the fingerprint of its ``input_ids``.
        fixed: [1, branches], of all rows whatever they are; None: they follow from the prompts.
        now: [rows, branches], of the current forward pass.
    """

    def __init__(self) -> None:
        self.gates: Sequence[Callable[[Tensor], Tensor]] = ()
        self.lengths: dict[int, int] = {}
        self.fixed: Tensor | None = None
        self.now = torch.zeros(0, 0)
        self.model: Any = None  # to which the hooks are attached
        self._hooks: list[RemovableHandle] = []
        self._inputs: dict[str, Any] | None = None  # of the current forward pass

    def attach(
        self,
        model: Any,
        gates: Sequence[Callable[[Tensor], Tensor]],
        layers: Mapping[str, Any],
        branches: Mapping[str, slice],
    ) -> None:
        """Put the hooks on a model.

        Args:
            layers: the adapted layers, by name.
            branches: which of the branches each adapter holds side by side, by the adapter's name.
        """
        self.detach()
        self.model, self.gates = model, gates
        inner = base(model)
        self._hooks = [
            inner.register_forward_pre_hook(self._begin, with_kwargs=True),
            inner.register_forward_hook(self._end, always_call=True),
            inner.get_input_embeddings().register_forward_hook(self._pool),
        ]
        for name, layer in layers.items():
            for adapter, part in branches.items():
                self._hooks.append(layer.lora_A[adapter].register_forward_hook(self._multiply(name, part)))

    def detach(self) -> None:
        """Take the hooks off."""
        for hook in self._hooks:
            hook.remove()
        self.model, self._hooks, self._inputs = None, [], None

    def _begin(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs = dict(zip(inspect.signature(module.forward).parameters, args, strict=False)) | kwargs
        if module.training and getattr(module, "is_gradient_checkpointing", False):
            raise ConfigError(f"training.gradient_checkpointing: {RECOMPUTED}; turn it off")
        self._inputs = inputs

    def _end(self, *args: Any) -> None:
        self._inputs = None

    def _pool(self, embedding: Any, args: tuple[Any, ...], output: Tensor) -> None:
        if self._inputs is None:
            return
        if self.fixed is not None:
            self.now = self.fixed
            return
        cache = cache_of(self._inputs)
        if cache is not None and cache.get_seq_length():
            return
        ids, mask, labels = args[0], self._inputs.get("attention_mask"), self._inputs.get("labels")
        seen = before_answer(ids, mask, labels, self.lengths)
        pooled = mean_embedding(output.detach(), seen)
        self.now = torch.cat([gate(pooled) for gate in self.gates], dim=1) if self.gates else pooled[:, :0]

    def _multiply(self, name: str, part: slice) -> Any:
        def multiply(layer: Any, args: Any, output: Tensor) -> Tensor:
            now = self.now[:, part]
            if output.dim() != 3 or len(now) not in (1, len(output)):
                raise ConfigError(
                    f"method gain_lora: {name} receives tokens of {list(output.shape[:-1])}, not of {len(now)} rows, "
                    "as an expert of a mixture; leave it out of the tuner's target_modules"
                )
            units = output.unflatten(-1, (now.shape[1], -1)) * now[:, None, :, None].to(output.dtype)
            return units.flatten(-2)

        return multiply
