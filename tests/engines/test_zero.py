"""Weights, gradients and optimizer state under DeepSpeed's ZeRO, against one process: changed, joined and put back."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from holdfast.engines.zero.profile import DEEPSPEED
from support.paths import TESTS

pytestmark = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")

RESUMED = ("zero2", "zero3_offload")


def start(processes: int, folder: Path, *engines: str) -> None:
    run = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if engines else []
    script = str(TESTS / "support" / "zero_worker.py")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PATH": "/usr/bin/no-compiler"}
    command = [sys.executable, *run, script, str(folder), *engines]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-5000:]


def same(one: Path, other: Path) -> None:
    expected, found = (torch.load(path, weights_only=True) for path in (one, other))
    torch.testing.assert_close(found["weights"], expected["weights"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found["model"], found["weights"], rtol=0, atol=0)
    if found["state"]:
        torch.testing.assert_close(found["state"], expected["state"], rtol=1e-4, atol=1e-6)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two stages by one process and by two; and a third one, of what two had saved, by one process and by three."""
    first, then = (tmp_path_factory.mktemp(name) for name in ("first", "then"))
    start(1, first)
    start(2, first, *DEEPSPEED)
    (then / "before.pt").write_bytes((first / "zero3.pt").read_bytes())
    start(1, then)
    start(3, then, *RESUMED)
    return first, then


@pytest.mark.slow
@pytest.mark.parametrize("engine", DEEPSPEED)
def test_changed_gradients_and_weights_train_as_on_one_process(runs: tuple[Path, Path], engine: str) -> None:
    same(runs[0] / "None.pt", runs[0] / f"{engine}.pt")


@pytest.mark.slow
@pytest.mark.parametrize("engine", RESUMED)
def test_another_number_of_processes_goes_on_from_saved_weights_and_state(runs: tuple[Path, Path], engine: str) -> None:
    same(runs[1] / "None.pt", runs[1] / f"{engine}.pt")
