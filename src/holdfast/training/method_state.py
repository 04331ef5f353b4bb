"""A method's state on disk: tensors in safetensors, plain values in JSON, one pair of files a method."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from holdfast.api.method import Method
from holdfast.engines.process import Process
from holdfast.system.files import read_json, write_json


def save_states(methods: Sequence[Method], folder: Path) -> None:
    """Write the state of every method into ``folder``; all processes join the tensors, and the main one writes."""
    for method in methods:
        state = method.state()
        if not Process.this().main:
            continue
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
        save_file(
            {key: t.detach().cpu().contiguous() for key, t in tensors.items()}, folder / f"{method.name}.safetensors"
        )
        values = {key: v for key, v in state.items() if key not in tensors}
        write_json(folder / f"{method.name}.json", values, exact=True)


def load_states(methods: Sequence[Method], folder: Path, model: nn.Module) -> None:
    """Give every method the state that :func:`save_states` wrote.

    The tensors are copied: those that safetensors maps begin anywhere, and a product of such a one may round otherwise
    than that of one which torch has put in its place.
    """
    for method in methods:
        tensors = load_file(folder / f"{method.name}.safetensors")
        state = read_json(folder / f"{method.name}.json") | {key: t.clone() for key, t in tensors.items()}
        method.load_state(state, model)
