"""The measurements of a laboratory run: losses on held-out text, and how far the weights have moved."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdfast.data.tokens.file import TokenRows
from holdfast.engines.pieces import full, reshard
from holdfast.engines.process import Process
from holdfast.losses import chunked_kl
from holdfast.losses.chunked import CHUNK_SIZE, Head
from holdfast.models.generation import inference
from holdfast.models.head import base, hidden_only, whole_head

Weights = dict[str, Tensor]
"""A model's weights by name, float32 on the CPU, without those that a tuner added."""


class Measures:
    """Measures a model on held-out parts, always on the same sequences.

    Args:
        parts: held-out sequences by domain.
        rows: number of sequences measured of each part, from its start.
        batch_size: sequences in one forward pass.
        process: this process; all processes divide the sequences among themselves.
    """

    def __init__(
        self,
        parts: dict[str, TokenRows],
        *,
        rows: int,
        batch_size: int,
        process: Process,
    ):
        self._process = process
        self._batches: dict[str, list[tuple[Tensor, bool]]] = {}  # each with whether it counts
        for domain, part in parts.items():
            batches = range(0, min(rows, len(part)), batch_size)
            # All ranks must run the model at the same time: one without a batch of its own repeats the last batch.
            numbers = range(process.rank, math.ceil(len(batches) / process.world) * process.world, process.world)
            starts = [(batches[min(number, len(batches) - 1)], number < len(batches)) for number in numbers]
            self._batches[domain] = [
                (part.batch(range(start, min(start + batch_size, rows, len(part)))), counts) for start, counts in starts
            ]
        self._teacher: dict[str, list[Tensor]] = {}
        self._teacher_head: Head | None = None

    def remember(self, model: Any) -> None:
        """Remember a model as it is now, by its hidden states and its head: ``kl`` is measured from it."""
        with inference(model):
            self._teacher = {
                domain: [_hidden(model, ids).cpu() for ids, _ in batches] for domain, batches in self._batches.items()
            }
            now = whole_head(model)
            self._teacher_head = now._replace(weight=now.weight.clone())

    def losses(self, model: Any) -> dict[str, dict[str, float | None]]:
        """Measure each domain, in nats per predicted token, over T - 1 positions of sequences of T tokens:

        - ``loss``: of the next token, in float32 even if training uses another precision;
        - ``second_half``: the same over the tokens of the second half of the context;
        - ``kl``: KL(remembered model ‖ this model), None if no model is remembered.
        """
        return {domain: self._losses(model, domain) for domain in self._batches}

    def _losses(self, model: Any, domain: str) -> dict[str, float | None]:
        sums = torch.zeros(6, dtype=torch.float64)
        with inference(model):
            for number, (ids, counts) in enumerate(self._batches[domain]):
                hidden, head = _hidden(model, ids)[:, :-1], whole_head(model)
                nll = _token_nll(hidden, head, ids[:, 1:].to(hidden.device)).cpu().double()
                half = nll[:, ids.shape[1] // 2 - 1 :]
                sums[:4] += counts * torch.stack(
                    [nll.sum(), torch.tensor(nll.numel()), half.sum(), torch.tensor(half.numel())]
                )
                if self._teacher_head is not None:
                    teacher = self._teacher[domain][number][:, :-1].to(hidden.device)
                    total, count = chunked_kl(hidden, head, teacher, self._teacher_head, None)
                    sums[4:] += counts * torch.stack([total.cpu(), count.cpu()])
        loss, tokens, second, second_tokens, kl, kl_tokens = self._process.all_reduce_sum(sums).tolist()
        return {
            "loss": loss / tokens,
            "second_half": second / second_tokens,
            "kl": kl / kl_tokens if kl_tokens else None,
        }


def _hidden(model: Any, ids: Tensor) -> Tensor:
    """Last hidden states [rows, seq, width], after the final norm, without those of a prompt's virtual tokens."""
    ids = ids.to(base(model).device)
    outputs = model(input_ids=ids, use_cache=False, output_hidden_states=True, **hidden_only(model))
    return outputs.hidden_states[-1][:, -ids.shape[1] :]


def _token_nll(hidden: Tensor, layer: Head, targets: Tensor) -> Tensor:
    """-log p of each target: hidden [rows, seq, width], targets [rows, seq] -> [rows, seq]."""
    pairs = zip(hidden.flatten(0, 1).split(CHUNK_SIZE), targets.flatten().split(CHUNK_SIZE), strict=True)
    nll = [F.cross_entropy(layer.logits(states), tokens, reduction="none") for states, tokens in pairs]
    return torch.cat(nll).view(targets.shape)


def weights_of(model: nn.Module) -> Weights:
    """A copy of a model's weights."""
    reshard(model)
    return {name: full(p.detach()).to("cpu", torch.float32, copy=True) for name, p in base(model).named_parameters()}


@torch.no_grad()
def distances(model: nn.Module, start: Weights, init: Weights | None) -> dict[str, float | None]:
    """Euclidean norms over all weights: ``norm`` of the weights, ``from_start`` and ``from_init`` of their changes.

    An update of LoRA and related tuners counts as part of the weight that it changes. A norm is None if the initial
    weights are unknown; all are None if the tuner's weights change the model in another way.
    """
    reshard(model)
    effective = _effective(model)
    if effective is None:
        return {"norm": None, "from_start": None, "from_init": None}
    sums = [0.0, 0.0, 0.0]
    for name, weight in effective:
        sums[0] += float(weight.square().sum())
        sums[1] += float((weight - start[name]).square().sum())
        sums[2] += float((weight - init[name]).square().sum()) if init is not None else 0.0
    norm, from_start, from_init = map(math.sqrt, sums)
    return {"norm": norm, "from_start": from_start, "from_init": from_init if init is not None else None}


def _effective(model: Any) -> Iterator[tuple[str, Tensor]] | None:
    """Pairs of a name without a tuner and the weight with its update; None if a tuner's weights are no such updates."""
    if not hasattr(model, "peft_config"):
        return ((name, full(p).float().cpu()) for name, p in model.named_parameters())
    layers = {name: m for name, m in base(model).named_modules() if hasattr(m, "get_delta_weight")}
    if not layers:
        return None
    [adapter] = model.active_adapters

    def weights() -> Iterator[tuple[str, Tensor]]:
        for name, p in base(model).named_parameters():
            layer, is_base, key = name.partition(".base_layer.")
            if is_base:
                update = layers[layer].get_delta_weight(adapter) if key == "weight" else 0
                yield f"{layer}.{key}", (full(p) + update).float().cpu()
            elif not any(name.startswith(f"{layer}.") for layer in layers):
                yield name, full(p).float().cpu()

    return weights()
