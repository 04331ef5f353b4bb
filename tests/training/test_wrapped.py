"""A wrapped class is the class that it wraps, with methods: nothing of it is overwritten, hidden or changed."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor, nn

from holdfast import continual
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
    """The same weights bit for bit, the same log but for the terms, and no attribute of the class replaced."""
    trainers = []
    for wrapped in (False, True):
        trainer = constructed(case, tmp_path, wrapped)
        before = vector(trainer.model).clone()
        trainer.train()
        trainers.append(trainer)
    plain, ours = trainers
    assert torch.equal(vector(plain.model), vector(ours.model)) and not torch.equal(vector(plain.model), before)
    assert vars(ours).keys() - vars(plain).keys() == {"_holdfast"}
    for one, other in zip(plain.state.log_history, ours.state.log_history, strict=True):
        assert other.keys() - one.keys() <= {"term/task"}
        for key in one.keys() - TIMES:
            assert other[key] == one[key], key
    for name in ("_step", "_tokenizer"):
        assert type(getattr(ours, name, None)) is type(getattr(plain, name, None))


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
