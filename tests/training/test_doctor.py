"""`holdfast doctor` knows what training takes: as a real model counts it, and as a real process holds it."""

from __future__ import annotations

import itertools
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from transformers import MixtralConfig
from typer.testing import CliRunner

from holdfast.cli import app
from holdfast.config.section import Named
from holdfast.config.training import TrainingConfig
from holdfast.errors import ConfigError
from holdfast.models.attention import fastest
from holdfast.training.memory_estimate import HOLES, Estimate, Memory, advice
from holdfast.tuners import build, known
from support.paths import ROOT
from support.tiny import VOCABULARY, tiny_model, write_model

BENCHMARK = ROOT / "benchmarks" / "memory.py"


def estimate(tuner: str = "full", length: int = 16, precision: str = "float32", **options) -> Estimate:
    return Estimate(tiny_model().config, build(Named(name=tuner, **options)), length, precision)


@pytest.mark.parametrize("name", known())
def test_sizes_are_those_of_a_real_model(name):
    tuner = build(Named(name=name))
    tuner.plan(TrainingConfig(), 1000)
    model = tuner.prepare(tiny_model())
    trained = [p for p in model.parameters() if p.requires_grad]
    memory = estimate(name).memory(2)
    assert memory.trained == sum(p.numel() for p in trained)
    assert memory.weights == sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
    assert memory.gradients == 4 * memory.trained and memory.optimizer == 8 * memory.trained


def test_frozen_weights_in_bfloat16_take_half():
    lora = build(Named(name="lora"))
    wide, half = (Estimate(tiny_model().config, lora, 16, dtype=t).memory(2) for t in ("float32", "bfloat16"))
    own = sum(p.numel() for p in tiny_model().parameters())
    assert wide.weights - half.weights == 2 * own and wide.gradients == half.gradients == 4 * half.trained


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["full", "freeze", "lora", "adapter"])
def test_activations_are_what_autograd_keeps_of_real_tensors(name, precision):
    bare = tiny_model()
    bare.set_attn_implementation(fastest(precision) or "sdpa")
    model = build(Named(name=name)).prepare(bare).train()
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    kept = {}
    ids = torch.randint(3, VOCABULARY, (3, 16))
    mask = torch.ones_like(ids)
    mask[0, -1] = 0  # without padding, transformers leaves the mask out

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    mixed = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16")
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), mixed:
        model(input_ids=ids, attention_mask=mask, use_cache=False)
    real = sum(t.untyped_storage().nbytes() for place, t in kept.items() if place not in own)
    assert estimate(name, precision=precision).memory(3).activations == pytest.approx(real, rel=0.02)


def test_peak_by_hand():
    memory = Memory(
        trained=5,
        weights=100,
        gradients=20,
        optimizer=40,
        update=7,
        activations=50,
        checkpointed=10,
        logits=6,
        holes=1000,
    )
    assert memory.peak() == 1140 + 56
    assert memory.peak(checkpointing=True) == 1140 + 27
    assert memory.peak(accumulation=True) == 1140 + 20 + 56
    assert memory.peak(checkpointing=True, accumulation=True) == 1140 + 20 + 16


def test_holes_in_the_heap_go_with_the_environment(monkeypatch):
    memory = estimate("lora").memory(3)
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
    mapped = estimate("lora").memory(3)
    assert mapped.holes == 0 and mapped == replace(memory, holes=0)
    assert memory.peak() - mapped.peak() == memory.holes
    monkeypatch.delenv("MALLOC_MMAP_THRESHOLD_")
    monkeypatch.setattr("platform.libc_ver", lambda: ("glibc", "2.36"))
    assert estimate("lora").memory(3).holes == round(HOLES * memory.activations)
    monkeypatch.setattr("holdfast.training.memory_estimate.IN_HEAP", 1)  # as if every tensor were larger
    assert estimate("lora").memory(3).holes == 0


def test_logits_and_quantized_weights_by_hand():
    lora = estimate("lora", length=16)
    assert lora.memory(3).logits == 12 * 3 * 16 * VOCABULARY
    linear = 2 * (2 * 16 * 16 + 2 * 16 * 8 + 3 * 16 * 32)  # query and output, key and value, the three of the MLP
    saved = lora.memory(3).weights - lora.memory(3, quantized=True).weights
    assert saved == pytest.approx(linear * (4 - 4.127 / 8), abs=1)


def test_more_rows_and_longer_rows_take_more():
    for name in ("full", "lora", "prompt"):
        rows = [estimate(name).memory(n) for n in (1, 2, 4)]
        lengths = [estimate(name, length=n).memory(2) for n in (8, 16, 32)]
        for less, more in [*itertools.pairwise(rows), *itertools.pairwise(lengths)]:
            assert less.activations < more.activations and less.logits < more.logits
            assert less.checkpointed < more.checkpointed < more.activations
            assert less.weights == more.weights


def test_advice_is_the_first_change_that_fits():
    lora = estimate("lora", length=64)
    memory = lora.memory(8)
    assert advice(lora, 8, memory.peak(checkpointing=True)) == "training.gradient_checkpointing: true"
    assert "4bit" in advice(lora, 1, lora.memory(1, quantized=True).peak(checkpointing=True))
    assert advice(lora, 8, 0) is None
    assert "checkpointing" not in (advice(estimate("prefix"), 8, 10**6) or "")


def test_a_model_whose_memory_depends_on_values_is_refused():
    config = MixtralConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=2,
    )
    config._experts_implementation = "eager"
    with pytest.raises(ConfigError, match="shapes alone"):
        Estimate(config, build(Named(name="full")), 16).memory(1)


def test_the_command(tmp_path):
    write_model(tmp_path / "model")
    result = CliRunner().invoke(app, ["doctor", str(tmp_path / "model"), "--max-length", "16", "--batch-size", "2"])
    assert result.exit_code == 0, result.output
    for name in known():
        assert f" {name} " in result.output
    assert result.output.count(" yes") == len(known())
    machine = CliRunner().invoke(app, ["doctor"]).output
    assert "bitsandbytes" in machine and "flash_attn" in machine


@pytest.mark.slow
def test_estimate_is_within_a_fifth_of_what_a_process_holds():
    command = [sys.executable, str(BENCHMARK), "--sizes", "20M"]
    table = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    rows = [line.split("|") for line in table.splitlines() if line.startswith("| 20M")]
    assert len(rows) == 2
    for row in rows:
        assert 0.8 < float(row[5]) < 1.2 and 0.9 < float(row[8]) < 1.1, table
