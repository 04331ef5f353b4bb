"""Training with the head on supervised tokens alone: the steps are those of a head on every position."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Trainer

from holdfast.api.method import Method
from holdfast.api.stage import Extra
from holdfast.data.collate import pack
from holdfast.training import extra_rows, trainer
from holdfast.training.chunked_trainer import ChunkedLossTrainer
from holdfast.training.trainer import continual
from support.tiny import VOCABULARY, tiny_model, tiny_rows
from support.trained import trained, vector

SGD = {"optim": "sgd", "learning_rate": 0.5, "lr_scheduler_type": "constant", "logging_steps": 1}
HALVES = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
METHODS: list[Any] = [
    "sequential",
    {"name": "replay", "ratio": 1.0},
    "lwf",
    {"name": "rehearsal", "source": "current", "loss": "kl", "ce_weight": 0.5},
    {"name": "der", "ratio": 1.0, "weight": 5.0},
    {"name": "der_pp", "ratio": 1.0, "weight": 5.0},
    ["eaft", "talr", "flow"],
]


def name_of(method: Any) -> str:
    if isinstance(method, list):
        return "-".join(method)
    return method if isinstance(method, str) else method["name"]


@pytest.fixture
def everywhere(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Called, it makes trainers apply the head to every position."""
    return lambda: monkeypatch.setattr(trainer, "may_gather", lambda *args: False)


def steps(folder: Any, **changes: Any) -> tuple[torch.Tensor, list[dict[str, float]]]:
    """The weights after two stages, and the log without what depends on time."""
    done = trained(folder, stages=0, rows=changes.pop("rows", tiny_rows(9, length=16)), **changes)
    for stage in (1, 2):
        torch.manual_seed(stage)
        done.train()
    log = [{key: value for key, value in line.items() if "runtime" not in key} for line in done.state.log_history]
    return vector(done.model), [line for line in log if "loss" in line]


def assert_the_same(folder: Any, everywhere: Any, **changes: Any) -> None:
    weights, log = steps(folder / "gathered", **changes)
    everywhere()
    expected, lines = steps(folder / "everywhere", **changes)
    torch.testing.assert_close(weights, expected, rtol=1e-5, atol=2e-6)
    for line, other in zip(log, lines, strict=True):
        assert line == pytest.approx(other, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("method", METHODS, ids=name_of)
@pytest.mark.parametrize("one_pass", [False, True], ids=["halves", "one pass"])
def test_the_steps_are_the_same(method, one_pass, tmp_path, everywhere, monkeypatch):
    monkeypatch.setattr(extra_rows.ExtraRows, "fits_one_pass", lambda self, inputs, extra: one_pass and bool(extra))
    assert_the_same(tmp_path, everywhere, method=method, args=SGD if one_pass else SGD | HALVES)


@pytest.mark.parametrize(
    "args", [{"label_smoothing_factor": 0.2}, {"gradient_checkpointing": True}], ids=lambda args: next(iter(args))
)
def test_what_trainer_offers_stays_the_same(args, tmp_path, everywhere):
    assert_the_same(tmp_path, everywhere, method={"name": "replay", "ratio": 1.0}, args=SGD | HALVES | args)


def test_packed_rows(tmp_path, everywhere):
    rows = pack(tiny_rows(16), 24)
    assert_the_same(tmp_path, everywhere, method="lwf", rows=rows, args=SGD)


def test_an_adapter_on_the_head(tmp_path, everywhere):
    def model():
        torch.manual_seed(0)
        config = LoraConfig(r=2, target_modules=["lm_head", "q_proj"], init_lora_weights=False)
        return get_peft_model(tiny_model(tie_word_embeddings=False), config)

    found, _ = steps(tmp_path / "gathered", model=model(), args=SGD)
    everywhere()
    expected, _ = steps(tmp_path / "everywhere", model=model(), args=SGD)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-6)


class Widest(TorchDispatchMode):
    """Notes at how many positions something of the vocabulary's size was computed, at most."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and x.dim() > 1 and x.shape[-1] == VOCABULARY and x.is_floating_point():
                self.most = max(self.most, x.numel() // VOCABULARY)
        return result


def positions(folder, rows, **changes):
    with Widest() as widest:
        trained(folder, rows=rows, stages=2, args=SGD, model=tiny_model(hidden_size=20), **changes)
    return widest.most


@pytest.mark.parametrize("method", METHODS, ids=name_of)
def test_no_position_without_a_label_has_logits(method, tmp_path):
    rows = [{"input_ids": [*range(3, 43)], "labels": [-100] * 38 + [41, 42]} for _ in range(8)]
    assert positions(tmp_path, rows, method=method) <= 20  # also as wide as the vocabulary: the head's gradient


class Reads(Method, registered=False):
    """Reads the logits of the task's rows."""

    name = "reads"

    def loss_terms(self, step, batch, outputs):
        assert outputs.logits.shape[:2] == batch["labels"].shape
        return {}


class Everything(Method, registered=False):
    """Asks for the logits of every position of its rows."""

    name = "everything"
    reads_outputs = False

    def extra_rows(self, step):
        return Extra(tiny_rows(3), self.way)

    def loss_terms(self, step, batch, outputs):
        rehearsed = step.rehearsed[self.name]
        assert rehearsed.logits.shape[:2] == rehearsed.labels.shape
        return {}


class Beside(Everything, registered=False):
    way = "beside"


class OfTheTask(Everything, registered=False):
    way = "task"

    def extra_rows(self, step):
        return Extra((), "task")


@pytest.mark.parametrize("method", [Reads(), Beside(), OfTheTask()], ids=lambda method: type(method).__name__)
def test_a_method_gets_the_logits_that_it_reads(method, tmp_path):
    trained(tmp_path, method=[method, "lwf"], args=SGD)


def test_a_loss_of_the_users_own_gets_every_position(tmp_path):
    seen = []

    class Own(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
            seen.append(outputs.logits.shape[:2] == inputs["input_ids"].shape)
            return (loss, outputs) if return_outputs else loss

    def own_loss(outputs, labels, num_items_in_batch=None):
        seen.append(outputs.logits.shape[:2] == labels.shape)
        return outputs.logits.sum() * 0

    trained(tmp_path, continual(Own))
    trained(tmp_path, compute_loss_func=own_loss)
    assert seen and all(seen)
    assert not trained(tmp_path, continual(ChunkedLossTrainer))._holdfast.gathers
    assert trained(tmp_path)._holdfast.gathers
