"""An optimizer's state on disk: whole tensors by parameter name, whatever the engine and however many processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from holdfast.engines.pieces import layout_of, trainable
from holdfast.engines.process import Process
from holdfast.engines.whole import former_names
from holdfast.system.files import read_json, write_json
from holdfast.system.shapes import Facts, alike, of_shape

TENSORS, VALUES = "optimizer.safetensors", "optimizer.json"
MOMENTS = {"exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "square_avg", "grad_avg", "sum"}
"""Entries of torch's optimizers that are of their parameter's shape."""


def save_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module, folder: Path) -> None:
    """Write a torch optimizer's state; all processes join their pieces tensor by tensor, and the main one writes."""
    main = Process.this().main
    names = {id(p): name for name, p in trainable(model).items()}
    tensors: dict[str, Tensor] = {}
    memory: set[int] = set()
    values: dict[str, Any] = {"groups": [], "states": {}}
    for group in optimizer.param_groups:
        settings = {key: value for key, value in group.items() if key != "params"}
        values["groups"].append(settings | {"params": [names[id(p)] for p in group["params"]]})
        for p in group["params"]:
            name = names[id(p)]
            for key, value in optimizer.state.get(p, {}).items():
                if isinstance(value, Tensor):
                    whole = layout_of(p).state_to_save(p, value).detach()
                    if main:
                        whole = whole.cpu().contiguous()
                        place = whole.untyped_storage().data_ptr()
                        # Parameters may share an entry, such as the count of steps of ZeRO's flat tensor.
                        tensors[f"{name}/{key}"] = whole.clone() if place in memory else whole
                        memory.add(place)
                else:
                    values["states"].setdefault(name, {})[key] = value
    if main:
        save_file(tensors, folder / TENSORS)
        write_json(folder / VALUES, values, exact=True)


def load_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module, folder: Path) -> list[int | None]:
    """Read back what :func:`save_optimizer` wrote; each process takes its pieces.

    Returns:
        for each group of the optimizer its number among the saved ones, which may lack groups without parameters, as
        DeepSpeed does; None for such a group.

    Raises:
        ValueError: it is no state of such an optimizer.
    """
    saved, values = load_file(folder / TENSORS), of_shape(dict[str, Any], read_json(folder / VALUES))
    of_shape(list[Facts], values["groups"], "groups"), of_shape(dict[str, Facts], values["states"], "states")
    group_of = {
        name: number
        for number, group in enumerate(values["groups"])
        for name in of_shape(list[str], group["params"], "params")
    }
    former = former_names(model)
    names = {id(p): name if name in group_of else former.get(name, name) for name, p in trainable(model).items()}
    states: dict[str, dict[str, Any]] = {name: dict(state) for name, state in values["states"].items()}
    for entry, value in saved.items():
        name, _, key = entry.rpartition("/")
        states.setdefault(name, {})[key] = value
    number, state, groups, numbers = 0, {}, [], list[int | None]()
    for group in optimizer.param_groups:
        numbers.append(group_of[names[id(group["params"][0])]] if group["params"] else None)
        settings = {} if numbers[-1] is None else values["groups"][numbers[-1]]
        if other := [
            key for key, v in settings.items() if key in group.keys() - {"params"} and not alike(v, group[key])
        ]:
            raise ValueError(f"{VALUES}: {other[0]}: cannot be {settings[other[0]]!r:.60}")
        settings = {key: tuple(v) if isinstance(group.get(key), tuple) else v for key, v in settings.items()}
        groups.append(group | settings | {"params": list(range(number, number + len(group["params"])))})
        for p in group["params"]:
            entries = states.get(names[id(p)])
            if entries is not None:
                _check_entries(p, entries)
                state[number] = {
                    key: layout_of(p).state_to_load(p, value) if isinstance(value, Tensor) else value
                    for key, value in entries.items()
                }
            number += 1
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    return numbers


def _check_entries(p: Tensor, entries: dict[str, Any]) -> None:
    """ValueError if an entry of a parameter's state is not of its shape, or a plain value no number."""
    piece = layout_of(p).piece(p)
    shape = p.shape if piece is None else piece.shape
    for key, value in entries.items():
        if isinstance(value, Tensor):
            fits = value.shape == shape if key in MOMENTS else key != "step" or value.numel() == 1
        else:
            fits = alike(value, 0.0)
        if not fits:
            raise ValueError(f"{TENSORS}: {key}: is not of the parameter's shape, or no number")
