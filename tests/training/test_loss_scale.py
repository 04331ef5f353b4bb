"""fp16's loss scale: methods see gradients without it, and a step that it skips is no step for them.

Mixed precision itself needs a GPU. Here the arithmetic stays in float32, so that only the scale, a power of two, can
make a difference; scaler, unscaling and skipped steps are torch's and accelerate's own.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import AutocastKwargs, HfDeepSpeedConfig
from transformers import Trainer, TrainerCallback

from holdfast.api.method import Method
from holdfast.config.section import Named
from holdfast.errors import ConfigError, NonFiniteLossError
from holdfast.methods import build
from holdfast.training.engine_mixin import check_loss_scale
from holdfast.training.trainer import ContinualTrainer
from holdfast.tuners import build as build_tuner
from support.guards import case, tuner_of
from support.tiny import tiny_model, tiny_rows
from support.trained import trained, vector

SCALE = 2.0**16
GRADIENT_METHODS = ("ewc", "mas", "si", "o_lora", "mbpa", "a_gem", "gem", "ogd", "tree_lora", "osf", "cia", "adalora")


@pytest.fixture
def scaled(monkeypatch):
    """Give a trainer a loss scale."""

    def scale(trainer, size=SCALE):
        accelerator = trainer.accelerator
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=size)
        accelerator.native_amp, accelerator.autocast_handler = True, AutocastKwargs(enabled=False)
        monkeypatch.setattr(accelerator.state, "_mixed_precision", "fp16")
        return trainer

    yield scale
    monkeypatch.undo()


def prepared(folder, name):
    """A trainer of a method with clipping and AdamW, Trainer's defaults."""
    options = case(name).options if name != "adalora" else {}
    tuner = tuner_of(name) if name != "adalora" else {"name": "adalora", "total_step": 12, "lora_dropout": 0.0}
    tuner = build_tuner(Named.model_validate(tuner if isinstance(tuner, dict) else {"name": tuner}))
    torch.manual_seed(0)
    model = tuner.prepare(tiny_model())
    methods = [] if name == "adalora" else build([(name, options | ({"replay": 0.5} if name == "mbpa" else {}))])
    return trained(folder, model=model, method=[*methods, *filter(None, [tuner.companion()])], stages=0)


def two_stages(trainer):
    for stage in (1, 2):
        torch.manual_seed(stage)
        trainer.train_dataset = tiny_rows(12, seed=stage)
        trainer.train()
    return trainer


@pytest.mark.parametrize("name", GRADIENT_METHODS)
def test_values_are_those_without_a_loss_scale(name, tmp_path, scaled):
    """Weights, memory and the log, bit for bit."""
    plain = two_stages(prepared(tmp_path, name))
    ours = two_stages(scaled(prepared(tmp_path, name)))
    assert ours.accelerator.scaler.get_scale() == SCALE
    assert torch.equal(vector(ours.model), vector(plain.model))
    for one, other in zip(ours.methods, plain.methods, strict=True):
        a, b = one.state(), other.state()
        assert a.keys() == b.keys()
        assert all(torch.equal(x, b[key]) if isinstance(x, torch.Tensor) else x == b[key] for key, x in a.items())
    logs = [
        [{k: v for k, v in line.items() if k.startswith("term/")} for line in trainer.state.log_history]
        for trainer in (ours, plain)
    ]
    assert logs[0] == logs[1]


class Counter(Method):
    """Needs gradients; counts what it sees."""

    name = "counter"

    def __init__(self):
        super().__init__()
        self.gradients, self.steps = 0, 0

    def after_backward(self, step, gradients):
        assert all(bool(t.isfinite().all()) for t in gradients.tensors.values())
        self.gradients += 1
        return {}

    def after_step(self, step, weights):
        self.steps += 1


class Weights(TrainerCallback):
    def __init__(self):
        self.seen = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.seen.append(vector(model))


def overflow(trainer, steps):
    """Make a gradient infinite in some steps."""
    first = next(trainer.model.parameters())
    first.register_hook(lambda g: g * torch.inf if trainer.state.global_step in steps else g)


@pytest.mark.parametrize("cls", [ContinualTrainer, Trainer])
def test_a_step_that_overflows_is_skipped_and_training_goes_on(cls, tmp_path, scaled):
    method = Counter()
    extra = {"method": ["si", method]} if cls is ContinualTrainer else {}
    trainer = scaled(trained(tmp_path, cls, stages=0, **extra))
    overflow(trainer, {1})
    watch = Weights()
    trainer.add_callback(watch)
    trainer.train()
    first, second, third, *_ = watch.seen
    assert torch.equal(first, second) and not torch.equal(second, third)
    assert bool(watch.seen[-1].isfinite().all())
    assert trainer.accelerator.scaler.get_scale() == SCALE / 2
    if cls is ContinualTrainer:
        assert method.gradients == method.steps == trainer.state.global_step - 1
        assert all(bool(t.isfinite().all()) for t in trainer.methods[0].state().values() if isinstance(t, torch.Tensor))


@pytest.mark.parametrize("method", ["si", "ewc", "o_lora"])
def test_methods_that_need_gradients_are_refused_with_deepspeeds_fp16(method, tmp_path):
    """It keeps gradients in float16, multiplied by the scale."""

    def trainer(fp16, *names):
        config = HfDeepSpeedConfig({"zero_optimization": {"stage": 2}, "fp16": {"enabled": fp16}})
        state = SimpleNamespace(deepspeed_plugin=SimpleNamespace(hf_ds_config=config))
        holdfast = trained(tmp_path, stages=0, method=list(names))._holdfast
        accelerator = SimpleNamespace(state=state)
        return SimpleNamespace(_holdfast=holdfast, is_deepspeed_enabled=True, accelerator=accelerator)

    with pytest.raises(ConfigError, match=f"fp16: method {method} needs the gradients, which DeepSpeed keeps"):
        check_loss_scale(trainer(True, "replay", method))
    check_loss_scale(trainer(True, "replay"))
    check_loss_scale(trainer(False, method))


def test_gradients_that_no_scale_makes_finite_end_the_training(tmp_path, scaled):
    trainer = scaled(trained(tmp_path, stages=0, method=build([("replay", {})])), size=2.0)
    overflow(trainer, range(100))
    before = vector(trainer.model)
    with pytest.raises(NonFiniteLossError, match="the weights were not touched"):
        trainer.train()
    assert torch.equal(before, vector(trainer.model))
