"""LoRA models for the tests of methods that work on adapters."""

from __future__ import annotations

import json
import signal

import pytest
import torch
from peft import LoraConfig, get_peft_model

from holdfast.api.stage import Step
from holdfast.engines.vectors import gradients
from holdfast.runner.run import run
from holdfast.system.progress import Progress
from holdfast.tuners.lora_factors import factors
from support import forked
from support.paths import TESTS
from support.resumed import tensors
from support.tiny import pad_rows, tiny_config, tiny_model, tiny_rows

KILLED = TESTS / "support" / "killed.py"


def lora_model(seed=0, **changes):
    options = {"r": 3, "lora_alpha": 10, "lora_dropout": 0.0, "target_modules": "all-linear"} | changes
    model = tiny_model(seed)
    torch.manual_seed(seed)
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **options))


def shake(model, seed, scale=0.3):
    """As if a stage had trained: B is no longer zero."""
    torch.manual_seed(seed)
    for w in factors(model).values():
        w.add_(scale * torch.randn_like(w))


def logits(model, seed=5):
    training = model.training
    model.eval()
    batch = pad_rows(tiny_rows(4, seed=seed))
    batch.pop("labels")
    with torch.no_grad():
        result = model(**batch).logits
    model.train(training)
    return result


def results(directory):
    events = [json.loads(line) for line in (directory / "events.jsonl").read_text().splitlines()]
    return (
        json.loads((directory / "matrix.json").read_text()),
        tensors(directory),
        [(e["stage"], e["step"], e["terms"]) for e in events],
    )


def killed_in_stage_2_equals_unbroken(folder, method):
    """Two stages of 6 steps, saved every 2; killed after the third step of the second, continued in this process."""
    config = tiny_config(folder, method=method, tuner={"name": "lora", "r": 3, "lora_dropout": 0.3})
    config["stream"]["order"] = ["red", "green"]
    config["training"] |= {"epochs": 2, "save_every": 2}
    whole, broken = (config | {"output": str(folder / name)} for name in ("whole", "broken"))
    (folder / "broken.json").write_text(json.dumps(broken))
    killed = forked.run(KILLED, folder / "broken.json", "step", 9)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    [checkpoint] = (folder / "broken" / "stages" / "02-green" / "checkpoint").iterdir()
    assert checkpoint.name == "checkpoint-2"
    for one in (broken, whole):
        run(one, Progress(quiet=True))
    first, second = results(folder / "whole"), results(folder / "broken")
    for a, b in zip(first, second, strict=True):
        assert a == b
    return first


def saved_ranks(directory):
    return [json.loads(p.read_text())["r"] for p in sorted(directory.glob("stages/*/adapter/adapter_config.json"))]


def equals_penalty(method, stage, new, loss, atol=1e-5):
    """A method's declared term and what it adds to gradients are a penalty's value and gradient.

    Args:
        new: leaves with gradient, the factors by name, of which ``loss`` is the penalty.
    """
    loss.backward()
    for p in stage.model.parameters():
        p.grad = torch.full_like(p, 2.0) if p.requires_grad else None
    values = method.after_backward(Step(stage, 0, 4, 1, logged=True), gradients(stage.model))
    assert method.declares(stage) == tuple(values) == (method.name,)
    assert values[method.name] == pytest.approx(loss.item(), rel=1e-4)
    found = dict(stage.model.named_parameters())
    for key, w in new.items():
        torch.testing.assert_close(found[f"{key}.default.weight"].grad, 2.0 + w.grad, rtol=1e-4, atol=atol)
