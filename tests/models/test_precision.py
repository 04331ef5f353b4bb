"""`auto` is bfloat16 where the machine has the instructions, the model is wide enough, and the tuner bears it."""

from __future__ import annotations

import pytest
import torch
from transformers import CONFIG_MAPPING

from holdfast.config.section import Named
from holdfast.config.training import TrainingConfig
from holdfast.models.precision import NARROWEST, Machine, fastest_precision
from holdfast.tuners import build, known
from support.tiny import tiny_model

CPU, GPU = Machine(gpu=False, bfloat16=True), Machine(gpu=True, bfloat16=True)


def chosen(machine: Machine, kind: str = "llama", width: int = NARROWEST, **options: bool) -> tuple[str, str]:
    key = "d_model" if kind in ("t5", "bart") else "hidden_size"
    found = fastest_precision(machine, CONFIG_MAPPING[kind](**{key: width}), **{"frozen": True} | options)
    assert found.why
    return found.weights, found.computation


def test_machine_width_and_tuner_decide():
    half, mixed, full = ("bfloat16", "bfloat16"), ("float32", "bfloat16"), ("float32", "float32")
    for machine in (CPU, GPU):
        assert chosen(machine) == half and chosen(machine, frozen=False) == mixed
        assert chosen(machine, width=NARROWEST - 64) == full
        assert chosen(machine, alone=False) == mixed  # an engine wants one data type
    for gpu in (False, True):
        assert chosen(Machine(gpu, bfloat16=False)) == full
    assert chosen(CPU, quantized=True) == full and chosen(GPU, quantized=True, alone=False) == half


@pytest.mark.parametrize("kind", ["gemma2", "mixtral", "t5", "bart", "mamba"])
def test_what_was_not_tried_on_a_processor(kind):
    """Gemma 2's attention is capped, which only eager attention does."""
    assert chosen(CPU, kind) == ("float32", "float32") and chosen(GPU, kind) == ("bfloat16", "bfloat16")


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "gemma3_text", "mistral", "phi3", "gpt_neox", "olmo2", "cohere"])
def test_other_families_as_llama(kind):
    assert chosen(CPU, kind) == ("bfloat16", "bfloat16")


@pytest.mark.parametrize("name", known())
def test_what_is_trained_is_float32(name):
    """Where a tuner leaves the model's own weights as they are, these may be bfloat16, and what it adds is not."""
    tuner = build(Named(name=name))
    tuner.plan(TrainingConfig(), 1000)
    model = tuner.prepare(tiny_model().to(torch.bfloat16))
    if tuner.frozen_base:
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    else:
        assert name in ("full", "freeze", "osf")


@pytest.mark.parametrize(
    "option",
    [{"init_lora_weights": "pissa"}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"bias": "all"}],
    ids=lambda option: next(iter(option)),
)
def test_lora_that_touches_the_model_s_own_weights(option):
    assert build(Named(name="lora")).frozen_base and not build(Named(name="lora", **option)).frozen_base
