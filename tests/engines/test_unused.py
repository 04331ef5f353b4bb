"""DeepSpeed is imported only by what trains on it."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
from accelerate.utils.other import extract_model_from_parallel

from holdfast.engines.unused import leave_deepspeed_unimported


class NotImported:
    """Fails where DeepSpeed is imported."""

    def find_spec(self, name: str, *rest: object) -> None:
        assert name != "deepspeed", "DeepSpeed is imported"


class DeepSpeedEngine(torch.nn.Module):
    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module


@pytest.fixture(autouse=True)
def _no_deepspeed(monkeypatch):
    monkeypatch.delitem(sys.modules, "deepspeed", raising=False)
    leave_deepspeed_unimported()


def test_a_model_is_saved_without_an_import_of_deepspeed(monkeypatch):
    monkeypatch.setattr(sys, "meta_path", [NotImported(), *sys.meta_path])
    model = torch.nn.Linear(1, 1)
    assert extract_model_from_parallel(model) is model


def test_a_model_within_an_engine_of_deepspeed_is_found_once_that_is_imported(monkeypatch):
    module = ModuleType("deepspeed")
    module.DeepSpeedEngine = DeepSpeedEngine
    monkeypatch.setitem(sys.modules, "deepspeed", module)
    model = torch.nn.Linear(1, 1)
    assert extract_model_from_parallel(DeepSpeedEngine(model)) is model
