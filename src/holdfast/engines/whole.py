"""Whole tensors of a divided model: saving, loading and fingerprints."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from holdfast.engines.pieces import full, is_divided, layout_of_model, reshard
from holdfast.engines.process import Process


def model_fingerprint(model: nn.Module) -> str:
    """SHA-256 (hexadecimal) over all weights and buffers of a model, by name, trainable or not."""
    reshard(model)
    return fingerprint((*model.named_parameters(), *model.named_buffers()))


def whole_state(model: nn.Module) -> dict[str, Tensor] | None:
    """What ``save_pretrained`` needs as ``state_dict`` where it cannot gather the weights itself; else None.

    The tensors are gathered one by one, for the main process alone, on the CPU; of an adapter, its own.
    """
    if layout_of_model(model).saved_by_transformers:
        return None
    state, joined = {}, {}
    for name, t in _saved(model):
        if id(t) not in joined:  # tied weights stay one tensor
            whole = full(t).detach()
            joined[id(t)] = whole.cpu() if Process.this().main else whole.new_empty(0)
        state[name] = joined[id(t)]
    return state


def saves_together(model: nn.Module) -> bool:
    """Whether all processes must take part when it is saved: soft prompts are, as what their network makes."""
    return is_divided(model) and hasattr(model, "prompt_encoder")


def whole_weights_to_load(model: nn.Module) -> AbstractContextManager[None]:
    """Within it ``load_state_dict`` finds whole weights, and each process has the same to load."""
    return layout_of_model(model).loading(model, [t for _, t in _saved(model)])


def former_names(model: nn.Module) -> dict[str, str]:
    """The names that version 0.1.0 gave to a model's trained tensors, by their names now, where these differ."""
    tuner: Any = getattr(model, "base_model", None)
    return tuner.former_names() if hasattr(type(tuner), "former_names") else {}


def _saved(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The tensors that ``save_pretrained`` writes, by name: of a model with adapters, the adapters' alone."""
    prefix = getattr(getattr(model, "base_model", None), "prefix", None) if hasattr(model, "peft_config") else None
    for name, t in model.state_dict(keep_vars=True).items():
        if prefix is None or t.requires_grad or prefix in name or not name.startswith("base_model.model."):
            yield name, t


def fingerprint(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 (hexadecimal) over the names, types, shapes and bytes of whole tensors, in order."""
    digest = hashlib.sha256()
    for name, t in ((name, full(t)) for name, t in tensors):
        digest.update(f"{name} {t.dtype} {list(t.shape)}\n".encode())
        digest.update(t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
