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

TENSORS, VALUES = "optimizer.safetensors", "optimizer.json"


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


def load_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module, folder: Path) -> None:
    """Read back what :func:`save_optimizer` wrote; each process takes its pieces."""
    saved, values = load_file(folder / TENSORS), read_json(folder / VALUES)
    settings_of = {name: group for group in values["groups"] for name in group["params"]}
    former = former_names(model)
    names = {id(p): name if name in settings_of else former.get(name, name) for name, p in trainable(model).items()}
    states: dict[str, dict[str, Any]] = {name: dict(state) for name, state in values["states"].items()}
    for entry, value in saved.items():
        name, _, key = entry.rpartition("/")
        states.setdefault(name, {})[key] = value
    number, state, groups = 0, {}, []
    for group in optimizer.param_groups:
        settings = settings_of[names[id(group["params"][0])]] if group["params"] else {}
        settings = {key: tuple(v) if isinstance(group.get(key), tuple) else v for key, v in settings.items()}
        groups.append(group | settings | {"params": list(range(number, number + len(group["params"])))})
        for p in group["params"]:
            entries = states.get(names[id(p)])
            if entries is not None:
                state[number] = {
                    key: layout_of(p).state_to_load(p, value) if isinstance(value, Tensor) else value
                    for key, value in entries.items()
                }
            number += 1
    optimizer.load_state_dict({"state": state, "param_groups": groups})
