"""A method's state on disk: one safetensors file for its tensors and one JSON file for its plain values."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from holdfast.api.method import Method
from holdfast.engines.process import Process
from holdfast.engines.whole import former_names
from holdfast.errors import RunDirectoryError
from holdfast.models.pretrained import readable
from holdfast.system.files import read_json, write_json
from holdfast.system.manifest import check


def save_states(methods: Sequence[Method], folder: Path) -> None:
    """Write the state of every method into ``folder``.

    All processes call this, since methods gather divided tensors; the main process writes.
    """
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
    """Load the states that :func:`save_states` wrote into the methods.

    The tensors are copied into memory of their own. Those that safetensors maps are not aligned, and a product with an
    unaligned tensor may round differently, so that a resumed run would differ in the last bit.

    Raises:
        RunDirectoryError: a file is damaged.
    """
    check(folder)
    now = {former: name for name, former in former_names(model).items()}
    for method in methods:
        file = folder / f"{method.name}.safetensors"
        try:
            tensors = {_named(key, now): t for key, t in load_file(file).items()}
        except (SafetensorError, OSError) as error:  # of version 0.1.0, whose files have no checksums
            raise RunDirectoryError(f"{file}: is damaged: {error}; restore it from a copy") from None
        values = read_json(folder / f"{method.name}.json")
        with readable(f"{folder / method.name}: is not a state of method {method.name!r}", RunDirectoryError):
            method.load_state(values | {key: t.clone() for key, t in tensors.items()}, model)


def _named(key: str, now: dict[str, str]) -> str:
    """A key of a state, such as "fisher/NAME", with the name that the model's tensor has now."""
    vector, slash, name = key.rpartition("/")
    return vector + slash + now.get(name, name)
