"""A wrapped class is the class that it wraps, with methods: nothing of it is overwritten, hidden or changed."""

from __future__ import annotations

import functools
import inspect
import math
import pickle
import shutil
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from holdfast import ContinualTrainer, continual
from holdfast.api.method import Method
from holdfast.errors import ConfigError, RunDirectoryError
from holdfast.methods import build
from support.trained import vector
from support.trl_cases import CASES, trainer_arguments, trainer_class


@pytest.fixture(params=CASES)
def case(request):
    trainer_class(request.param)  # skips where TRL is not installed
    return request.param


def constructed(case: str, folder: Path, wrapped: bool, **changes: Any) -> Any:
    cls = continual(trainer_class(case)) if wrapped else trainer_class(case)
    return cls(**trainer_arguments(case, folder, **changes))


def test_construction_adds_one_attribute_and_changes_none(case, tmp_path):
    plain, ours = (constructed(case, tmp_path, wrapped) for wrapped in (False, True))
    assert vars(ours).keys() - vars(plain).keys() == {"_holdfast"}
    assert vars(plain).keys() <= vars(ours).keys()
    different = [name for name, value in vars(plain).items() if content(value) != content(vars(ours)[name])]
    assert not different


def test_training_with_sequential_is_training_with_the_plain_class(case, tmp_path):
    """The same weights, the same log but for the terms, and no attribute of the class replaced.

    Where the loss is Trainer's own, weights and log are the same up to rounding, since the head is applied to
    supervised tokens alone; where it is the class's, bit for bit.
    """
    trainers = []
    for wrapped in (False, True):
        trainer = constructed(case, tmp_path, wrapped)
        before = vector(trainer.model).clone()
        trainer.train()
        trainers.append(trainer)
    plain, ours = trainers
    close = {"rtol": 1e-5, "atol": 1e-6} if ours._holdfast.gathers else {"rtol": 0, "atol": 0}
    assert ours._holdfast.gathers == (case in ("Trainer", "Seq2SeqTrainer"))
    torch.testing.assert_close(vector(plain.model), vector(ours.model), **close)
    assert not torch.equal(vector(plain.model), before)
    assert vars(ours).keys() - vars(plain).keys() == {"_holdfast"}
    for one, other in zip(plain.state.log_history, ours.state.log_history, strict=True):
        assert other.keys() - one.keys() <= {"term/task"}
        for key in one.keys() - TIMES:
            near = pytest.approx(one[key], rel=1e-4) if ours._holdfast.gathers else one[key]
            assert other[key] == near, key
    assert getattr(ours, "_step", None) == getattr(plain, "_step", None)  # GRPO and RLOO count with it
    assert type(getattr(ours, "_tokenizer", None)) is type(getattr(plain, "_tokenizer", None))


def test_the_class_has_few_new_names():
    new = set(dir(ContinualTrainer)) - set(dir(Trainer)) - {"_holdfast"}
    assert new == {"forgetting_report", "keep_report", "methods", "task", "stage_index", "interrupted", "cost"}
    assert ContinualTrainer.__name__ == ContinualTrainer.__qualname__ == "ContinualTrainer"
    assert pickle.loads(pickle.dumps(ContinualTrainer)) is ContinualTrainer


def test_a_class_that_is_continual_already():
    class Mine(ContinualTrainer):
        pass

    assert continual(Mine) is Mine


def test_with_sequential_a_loss_that_is_not_finite_is_left_to_trainer(tmp_path):
    """Trainer goes on, and filters such losses out of its log where its arguments say so."""
    logs = []
    for cls in (Trainer, ContinualTrainer):
        trainer = cls(**trainer_arguments("Trainer", tmp_path, learning_rate=1e9, logging_nan_inf_filter=False))
        with torch.no_grad():
            next(trainer.model.parameters()).fill_(torch.nan)
        trainer.train()
        logs.append([line["loss"] for line in trainer.state.log_history if "loss" in line])
    assert len(logs[0]) == len(logs[1]) == 3 and all(math.isnan(loss) for log in logs for loss in log)


class Full(Trainer):
    """A trainer that has names of ours for itself, and takes its tokenizer as LLaMA-Factory's takes it."""

    cost = 7

    def __init__(self, **kwargs):
        kwargs["processing_class"] = kwargs.pop("tokenizer")
        assert not hasattr(self, "task")
        self.task = "translation"
        super().__init__(**kwargs)
        self._terms = self._stage = self._process = "mine"

    def _forward(self):
        return "mine"

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        assert (self.task, self.cost, self._forward()) == ("translation", 7, "mine")
        assert self._terms == self._stage == self._process == "mine"
        return super().compute_loss(model, inputs, return_outputs=return_outputs, **kwargs)


def test_names_of_the_wrapped_class_stay_its_own(tmp_path):
    given = trainer_arguments("Trainer", tmp_path)
    given["tokenizer"] = given.pop("processing_class")
    trainer = continual(Full)(**given, method="replay", stage_index=3)
    trainer.train()
    trainer.train()
    assert (trainer.task, trainer.cost, trainer.stage_index) == ("translation", 7, 5)
    assert logged(trainer, "replay")[-1] > 0
    trainer.methods = build([("ewc", {"samples": 2})])
    assert trainer._holdfast.methods is trainer.methods and "methods" not in vars(trainer)


def logged(trainer, name):
    return [log[f"term/{name}"] for log in trainer.state.log_history if f"term/{name}" in log]


def test_what_the_arguments_say_stays_while_a_method_trains(tmp_path):
    """DDP is told for the time of training alone that it need not look for unused parameters."""

    class Look(Method):
        name = "look_at_ddp"

        def extra_rows(self, step):
            seen.append(handler.find_unused_parameters)

    for method, inside in ((Look(), False), ("sequential", True)):
        seen: list[bool] = []
        trainer = ContinualTrainer(**trainer_arguments("Trainer", tmp_path), method=method)
        handler = trainer.accelerator.ddp_handler
        trainer.add_callback(EachStep(lambda handler=handler, seen=seen: seen.append(handler.find_unused_parameters)))
        callbacks = list(trainer.callback_handler.callbacks)
        trainer.train()
        assert set(seen) == {inside}
        assert handler.find_unused_parameters is True and trainer.args.ddp_find_unused_parameters is None
        assert trainer.callback_handler.callbacks == callbacks


class EachStep(TrainerCallback):
    def __init__(self, look):
        self.look = look

    def on_step_end(self, args, state, control, **kwargs):
        self.look()


def test_a_parameter_without_gradient_stays_as_it_is(tmp_path):
    """Weight decay leaves it alone, as in the plain class."""
    for cls in (Trainer, ContinualTrainer):
        given = trainer_arguments("Trainer", tmp_path, weight_decay=0.5)
        given["model"].spare = nn.Parameter(torch.ones(3))
        cls(**given).train()
        assert torch.equal(given["model"].spare, torch.ones(3))


def test_a_checkpoint_that_is_not_there(tmp_path):
    trainer = ContinualTrainer(**trainer_arguments("Trainer", tmp_path))
    with pytest.raises(ConfigError, match="No valid checkpoint found in output directory"):
        trainer.train(resume_from_checkpoint=True)
    Trainer(**trainer_arguments("Trainer", tmp_path, save_strategy="steps", save_steps=2)).train()
    with pytest.raises(ConfigError, match=r"checkpoint-3: .*complete\.json"):
        trainer.train(resume_from_checkpoint=True)


def test_a_checkpoint_of_another_stage(tmp_path):
    def trainer(task: str, **changes: Any) -> Any:
        arguments = trainer_arguments("Trainer", tmp_path, save_strategy="steps", save_steps=1, max_steps=2)
        return ContinualTrainer(**arguments, task=task, **changes)

    first = trainer("a", method="replay")
    first.train()
    for again in (trainer("b", stage_index=2), trainer("a", stage_index=2), trainer("b"), first):
        with pytest.raises(
            ConfigError, match=r"no checkpoint of stage . \('.'\) in .*checkpoint-2, is of stage 1 \('a'"
        ):
            if again is first:
                again.task = "b"
            again.train(resume_from_checkpoint=True)
        with pytest.raises(ConfigError, match=r"checkpoint-2: it is of stage 1 \('a'\), .* about to train stage ."):
            again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    shutil.rmtree(tmp_path / "out" / "checkpoint-1")
    second = trainer("b", stage_index=2)
    second.add_callback(StopAfter(1))
    second.train()
    assert (tmp_path / "out" / "checkpoint-1").is_dir()
    resumed = trainer("b", stage_index=2)
    resumed.train(resume_from_checkpoint=True)  # the newest of its own stage, not the newest of all
    assert resumed.state.global_step == 2 and len(resumed.state.log_history) > 1


class StopAfter(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


@pytest.mark.parametrize("name", ["optimizer.safetensors", "method/replay.json", "scheduler.pt", "model.safetensors"])
def test_a_damaged_checkpoint(name, tmp_path):
    arguments = trainer_arguments("Trainer", tmp_path, save_strategy="steps", save_steps=2, max_steps=2)
    ContinualTrainer(**arguments, method="replay").train()
    file = tmp_path / "out" / "checkpoint-2" / name
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(RunDirectoryError, match=rf"{Path(name).name}: is damaged: .*SHA.*delete .*checkpoint-2"):
        ContinualTrainer(**arguments, method="replay").train(resume_from_checkpoint=True)


TIMES = {"train_runtime", "train_samples_per_second", "train_steps_per_second", "step_time"}


def content(value: Any, depth: int = 6) -> Any:
    """What a value says, as plain Python that compares equal where two objects say the same."""
    if isinstance(value, str | int | float | bytes | bool | None | Enum | torch.dtype | torch.device | Path):
        return value
    if isinstance(value, Tensor):
        return str(value.dtype), value.tolist()
    if isinstance(value, nn.Module):
        names = {name: kind(module) for name, module in value.named_modules()}
        return names, content(dict(value.state_dict(keep_vars=True)), 2), value.training
    if isinstance(value, Dataset):
        return value.to_list()
    if isinstance(value, Mapping):
        return {str(key): content(entry, depth - 1) for key, entry in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        entries = [content(entry, depth - 1) for entry in value]
        return sorted(entries, key=str) if isinstance(value, set | frozenset) else entries
    if isinstance(value, functools.partial):
        return content([value.func, value.args, value.keywords], depth - 1)
    if inspect.isroutine(value) or inspect.isclass(value):
        return value.__qualname__
    if depth == 0 or not hasattr(value, "__dict__"):
        return kind(value)
    return kind(value), content(vars(value), depth - 1)


def kind(value: Any) -> str:
    return type(value).__name__
