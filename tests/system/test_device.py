"""Where a process computes, on GPUs that are not here: by torch's answers, and by tensors without values."""

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from holdfast.config.training import TrainingConfig
from holdfast.engines.shards import Shards
from holdfast.models.sampling import Draw
from holdfast.rehearsal.states import RunningMoments
from holdfast.sweep.work import visible_gpus
from holdfast.system import device
from holdfast.training.arguments import training_arguments


def pretend(monkeypatch, kind: str | None) -> None:
    """Let torch find a GPU of a kind, or none."""
    found = torch.device(kind) if kind else None
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: found)


@pytest.mark.parametrize("kind", ["cuda", "xpu", "mps"])
def test_a_gpu_that_torch_finds_is_used(monkeypatch, tmp_path, kind):
    pretend(monkeypatch, kind)
    assert device.device_type() == kind
    assert device.on_gpu()
    # The arguments ask for the device itself when they are made, which is not here.
    made = training_arguments(TrainingConfig(), tmp_path, {}, make=dict)
    assert made["use_cpu"] is False
    assert made["dataloader_pin_memory"] is (kind != "mps")


def test_without_a_gpu_or_at_the_switch_the_processor_computes(monkeypatch, tmp_path):
    pretend(monkeypatch, None)
    assert device.device_type() == "cpu"
    assert (device.gpu_count(), device.gpu_has_bfloat16()) == (0, False)
    pretend(monkeypatch, "mps")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert device.device_type() == "cpu"
    assert training_arguments(TrainingConfig(), tmp_path, {}).device.type == "cpu"


def test_processes_get_gpus_by_the_variable_of_their_maker(monkeypatch):
    monkeypatch.setenv("ZE_AFFINITY_MASK", "2,3")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert visible_gpus(2, device.VISIBLE["xpu"]) == ["2", "3"]
    assert visible_gpus(2, device.VISIBLE["cuda"]) == ["0", "1"]
    assert visible_gpus(1, device.VISIBLE.get("mps")) == ["0"]


class NoFloat64(TorchDispatchMode):
    """Refuses float64 on an Apple GPU, as that does."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for t in tree_leaves(made):
            assert not (isinstance(t, torch.Tensor) and t.device.type == "mps" and t.dtype == torch.float64), func
        return made


def vectors(place: str) -> Shards:
    return Shards({"a": torch.ones(3, 4, device=place), "b": torch.ones(5, device=place)})


def sums(place: str) -> list[torch.Tensor]:
    return [Shards.stack([vectors(place)] * 3).gram(), vectors(place).l1()]


def moments(place: str) -> list[torch.Tensor]:
    found = RunningMoments()
    for _ in range(2):
        found.add(torch.ones(4, 3, device=place))
    return [found.mean, found.std]


def drawn(place: str) -> list[torch.Tensor]:
    uniform = torch.full((2, 3), 0.5, dtype=torch.float64)
    draw = Draw(uniform, 0.7, top_p=0.9)
    return [draw(torch.zeros(2, 40, device=place)), *draw.log_probs]


@pytest.mark.parametrize("compute", [sums, moments, drawn])
def test_an_apple_gpu_is_asked_for_no_float64(compute):
    here = compute("cpu")
    with FakeTensorMode(allow_non_fake_inputs=True), NoFloat64():
        there = compute("mps")
    assert [(t.shape, t.dtype) for t in there] == [(t.shape, t.dtype) for t in here]


def test_the_refusal_sees_float64():
    with FakeTensorMode(), NoFloat64(), pytest.raises(AssertionError):
        torch.ones(2, device="mps").double()
