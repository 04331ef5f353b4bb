"""One place knows the layouts of engines; an optimizer whose parameters share some of its state goes on from disk."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import get_args

import pytest
import torch
from transformers import TrainingArguments
from transformers.optimization import Adafactor

from holdfast.config.training import Engine
from holdfast.data.collate import Collator
from holdfast.engines.fsdp2 import Fsdp2
from holdfast.engines.optimizer_state import load_optimizer, save_optimizer
from holdfast.engines.pieces import DIVIDED, WHOLE
from holdfast.engines.profiles import PROFILES, check_engine, loading_options
from holdfast.engines.zero.profile import ZeroProfile
from holdfast.errors import ConfigError
from holdfast.training import engine_mixin
from holdfast.training.trainer import ContinualTrainer
from support.paths import ROOT
from support.tiny import tiny_model, tiny_rows

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


def test_an_optimizer_that_cannot_step_pieces_is_refused():
    """Adafactor, for one, looks at rows and columns, of which ZeRO's flat tensors have none."""
    check_engine("ddp", "adafactor")
    for engine in ("zero1", "zero2", "zero3", "zero3_offload"):
        for name in ("adafactor", "muon"):
            with pytest.raises(ConfigError, match=rf"training.optimizer: {name} cannot step .* adamw_torch, .* can"):
                check_engine(engine, name)
    with pytest.raises(ConfigError, match="adafactor cannot step weights that the engine divides"):
        Fsdp2().check_optimizer("adafactor")


@pytest.mark.parametrize("layout", DIVIDED)
@pytest.mark.parametrize("cls", [Adafactor, torch.optim.Muon, type("Mine", (Adafactor,), {})])
def test_so_is_one_that_the_user_made(layout, cls):
    with pytest.raises(ConfigError, match=r"optimizer: (Adafactor|Muon) needs whole matrices"):
        layout.check_class(cls)
    layout.check_class(torch.optim.AdamW)
    WHOLE.check_class(cls)


@pytest.mark.parametrize("way", ["optimizers", "optimizer_cls_and_kwargs"])
def test_a_trainer_looks_at_the_optimizer_that_it_was_given(way, tmp_path, monkeypatch):
    monkeypatch.setattr(engine_mixin, "layout_of", lambda *parameters: Fsdp2())
    model = tiny_model()
    given = {
        "optimizers": (Adafactor(model.parameters(), lr=1e-3, relative_step=False), None),
        "optimizer_cls_and_kwargs": (Adafactor, {"lr": 1e-3, "relative_step": False}),
    }
    arguments = TrainingArguments(str(tmp_path), max_steps=1, report_to="none", use_cpu=True)
    trainer = ContinualTrainer(model, arguments, Collator(0), tiny_rows(8), method="sequential", **{way: given[way]})
    with pytest.raises(ConfigError, match="Adafactor needs whole matrices"):
        trainer.train()


def test_an_optimizer_whose_state_cannot_be_saved_is_refused():
    with pytest.raises(ConfigError, match=r"training.optimizer: the state of adamw_torch_8bit cannot be saved"):
        check_engine(None, "adamw_torch_8bit")


@pytest.mark.parametrize("used", [True, False])
def test_the_next_run_of_a_process_is_not_deepspeeds_because_the_last_was(used, monkeypatch):
    """accelerate leaves that word; where a launcher gave it, it stays."""
    monkeypatch.setattr(ZeroProfile, "used", used)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    assert loading_options("ddp") == {}
    assert ("ACCELERATE_USE_DEEPSPEED" in os.environ) is not used
