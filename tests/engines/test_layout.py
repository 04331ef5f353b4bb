"""One place knows the engines' layouts; and an optimizer's state whose parameters share an entry is saved and loaded."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import torch

from holdfast.config.training import Engine
from holdfast.engines.optimizer_state import load_optimizer, save_optimizer
from holdfast.engines.profiles import PROFILES
from support.paths import ROOT
from support.tiny import tiny_model

TAKES_OVER = "training/engine_mixin.py"
"""Where DeepSpeed takes a Trainer's optimizer step over."""


def test_every_engine_has_a_profile():
    assert tuple(PROFILES) == get_args(Engine)


def test_only_the_engines_ask_how_a_tensor_is_divided():
    names = re.compile(r"\b(DTensor|FSDPModule|fully_shard|GatheredParameters|ds_id|deepspeed_init)\b")
    package = ROOT / "src" / "holdfast"
    files = {path.relative_to(package).as_posix(): path for path in package.rglob("*.py")}
    found = {
        name: set(names.findall(path.read_text(encoding="utf-8")))
        for name, path in files.items()
        if not name.startswith("engines/")
    }
    assert {name: words for name, words in found.items() if words} == {TAKES_OVER: {"deepspeed_init"}}


def stepped(model: torch.nn.Module, steps: int) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(steps):
        step(model, optimizer)
    return optimizer


def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for p in model.parameters():
        p.grad = p.detach().sin()
    optimizer.step()


def test_a_state_whose_parameters_share_an_entry_is_saved_and_goes_on(tmp_path: Path):
    """As the count of steps of ZeRO's flat tensor, which belongs to all parameters that lie in it."""
    one, other = tiny_model(), tiny_model()
    before = stepped(one, 3)
    first = next(iter(before.state.values()))
    for state in before.state.values():
        state["step"] = first["step"]
    save_optimizer(before, one, tmp_path)
    other.load_state_dict(one.state_dict())
    after = stepped(other, 0)
    load_optimizer(after, other, tmp_path)
    assert [state["step"].item() for state in after.state.values()] == [3.0] * len(list(other.parameters()))
    for state in before.state.values():
        state["step"] = state["step"].clone()
    step(one, before)
    step(other, after)
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))
