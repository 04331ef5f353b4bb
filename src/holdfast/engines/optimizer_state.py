"""An optimizer's state on disk: whole tensors by parameter name, whatever the engine and however many processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from holdfast.engines.pieces import layout_of, trainable
from holdfast.engines.process import Process
from holdfast.system.files import read_json, write_json

TENSORS, VALUES = "optimizer.safetensors", "optimizer.json"


def save_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module, folder: Path) -> None:
    """Write a torch optimizer's state; all processes join their pieces tensor by tensor; the main one writes."""
    names = {id(p): name for name, p in trainable(model).items()}
    tensors: dict[str, Tensor] = {}
    values: dict[str, Any] = {"groups": [], "states": {}}
    for group in optimizer.param_groups:
        settings = {key: value for key, value in group.items() if key != "params"}
        values["groups"].append(settings | {"params": [names[id(p)] for p in group["params"]]})
        for p in group["params"]:
            name = names[id(p)]
            for key, value in optimizer.state.get(p, {}).items():
                if isinstance(value, Tensor):
                    whole = layout_of(p).state_to_save(p, value).detach()
                    tensors[f"{name}/{key}"] = whole.cpu().contiguous()
                else:
                    values["states"].setdefault(name, {})[key] = value
    if Process.this().main:
        save_file(tensors, folder / TENSORS)
        write_json(folder / VALUES, values, exact=True)


def load_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module, folder: Path) -> None:
    """Read back what :func:`save_optimizer` wrote; each process takes its pieces."""
    saved, values = load_file(folder / TENSORS), read_json(folder / VALUES)
    settings = {name: group for group in values["groups"] for name in group["params"]}
    names = {id(p): name for name, p in trainable(model).items()}
    states: dict[str, dict[str, Any]] = {name: dict(state) for name, state in values["states"].items()}
    for key, value in saved.items():
        name, _, of = key.rpartition("/")
        states.setdefault(name, {})[of] = value
    number, state, groups = 0, {}, []
    for group in optimizer.param_groups:
        known = settings[names[id(group["params"][0])]] if group["params"] else {}
        own = {key: tuple(v) if isinstance(group.get(key), tuple) else v for key, v in known.items()}
        groups.append(group | own | {"params": list(range(number, number + len(group["params"])))})
        for p in group["params"]:
            found = states.get(names[id(p)])
            if found is not None:
                state[number] = {
                    key: layout_of(p).state_to_load(p, value) if isinstance(value, Tensor) else value
                    for key, value in found.items()
                }
            number += 1
    optimizer.load_state_dict({"state": state, "param_groups": groups})
