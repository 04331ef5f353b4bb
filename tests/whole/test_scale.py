"""The formulas of docs/scale.md: the page is what they give, and small runs keep what they say."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors import safe_open

from benchmarks.scale import METHODS, SIZES, Training, tables, training
from holdfast.runner.run import run
from holdfast.system.progress import Progress
from support.paths import DOCS
from support.tiny import tiny_config

PAGE = DOCS / "scale.md"
KEPT = {
    "ewc, mas": [{"name": "ewc", "samples": 4}, {"name": "mas", "samples": 4}],
    "si": ["si"],
    "cia": ["cia"],
    "tree_lora": ["tree_lora"],
    "sequential": ["sequential"],
    "gem": [{"name": "gem", "capacity": 4}],
    "lwf": ["lwf"],
}


@pytest.mark.slow
def test_the_page_holds_what_the_formulas_give():
    page = PAGE.read_text(encoding="utf-8")
    for table in tables().strip().split("\n\n"):
        assert table in page


@pytest.mark.slow
def test_what_the_page_recommends_fits():
    """GiB of one GPU; 80 GB are 74.5 GiB, 24 GB are 22.4."""
    small, large = SIZES
    vectors = {cost.name: cost.vectors(8) for cost in METHODS}

    def gib(size, tuner, gpus, method="sequential", split=True):
        return training(size, tuner).memory(gpus, split, vectors[method]) / 2**30

    on_adapters = [cost.name for cost in METHODS]
    assert 0.9 * 22.4 < gib(small, "lora", 1, split=False) < 22.4
    assert all(gib(small, "lora", 1, method, split=False) < 38 for method in on_adapters)
    assert gib(small, "full", 2) < 74.5 < min(gib(small, "full", 8, method) for method in ("gem", "ogd"))
    assert all(gib(small, "full", 8, method) < 74.5 for method in ("ewc, mas", "si", "cia"))
    assert gib(large, "lora", 4) < 74.5 and all(gib(large, "lora", 8, method) < 74.5 for method in on_adapters)
    assert gib(large, "full", 16) > 74.5 > gib(large, "full", 24)
    whole = {cost.name for cost in METHODS if not cost.lora and gib(large, "full", 64, cost.name) < 74.5}
    assert whole == {cost.name for cost in METHODS if not cost.lora} - {"gem", "ogd"}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "method"), [(name, method) for name, methods in KEPT.items() for method in methods])
def test_a_stage_leaves_the_vectors_that_the_formula_says(tmp_path, name, method):
    values = tiny_config(tmp_path, method=method, tuner={"name": "lora", "r": 4, "lora_dropout": 0.0})
    values["stream"]["order"] = ["red", "blue"]
    values["training"] = {"max_steps": 3, "batch_size": 4, "learning_rate": 1e-2, "schedule": "constant", "warmup": 0}
    run(values, Progress(quiet=True))
    stage = tmp_path / "run" / "stages" / "02-blue"
    trained = numbers(stage / "adapter")
    cost = next(cost for cost in METHODS if cost.name == name)
    assert numbers(stage / "method") / trained == pytest.approx(cost.kept(2), abs=0.25)


def numbers(folder: Path) -> int:
    """Entries of the floating-point tensors in a folder's safetensors files; those of text and rows are no weights."""
    count = 0
    for path in folder.rglob("*.safetensors"):
        with safe_open(path, "pt") as file:
            tensors = [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118 - it is no mapping
            count += sum(tensor.numel() for tensor in tensors if tensor.is_floating_point())
    return count


def test_memory_and_bytes_are_the_formulas():
    own = Training(trained=1000, weights=4000 + 2 * 5000, activations=700, layers=10)
    assert own.memory(4, False) == 14000 + 12000 + 700
    assert own.memory(4, True) == 26000 / 4 + 2 * 1400 + 700
    assert own.memory(4, True, vectors=3) - own.memory(4, True) == 4 * 3 * 1000 / 4
    assert own.sent(4, False) == 2 * 3 / 4 * 4000
    assert own.sent(4, True, passes=2, forwards=1) == 3 / 4 * (2 * (28000 + 4000) + 14000)


def test_the_sizes_are_those_of_llama():
    full = training(SIZES[0], "full")
    assert full.trained == 8_030_261_248  # Llama-3.1-8B's
    assert full.weights == pytest.approx(4 * full.trained, rel=1e-6)
