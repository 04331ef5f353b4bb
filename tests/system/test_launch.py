"""`holdfast run --processes N`: processes start together, and one that dies stops all, with its own error first."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from support.paths import TESTS
from support.tiny import tiny_config

STARTER = """
import signal, sys, holdfast.cli, holdfast.system.launch
signal.signal(signal.SIGINT, signal.default_int_handler)  # what starts the tests may ignore it
holdfast.system.launch.COMMAND = [sys.executable, {stand_in!r}]
holdfast.cli.main()
"""


def start(folder: Path, *arguments: str, misbehave: str = "") -> subprocess.Popen[str]:
    """`holdfast run`, whose processes are stand-ins that load no model."""
    path = folder / "run.json"
    values = {"model": "none", "stream": {"path": "none"}, "output": str(folder / "run")}
    path.write_text(json.dumps(values), encoding="utf-8")
    code = STARTER.format(stand_in=str(TESTS / "support" / "launched.py"))
    return subprocess.Popen(
        [sys.executable, "-c", code, "run", str(path), *arguments],
        env=os.environ | {"MISBEHAVE": misbehave, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(process: subprocess.Popen[str]) -> tuple[int, list[str]]:
    """Exit code and the lines on standard error; a hang fails."""
    _, said = process.communicate(timeout=120)
    return process.returncode, said.splitlines()


def starts(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "run").glob("start-*"))


def test_processes_know_each_other(tmp_path):
    code, _ = ended(start(tmp_path, "--processes", "3"))
    assert code == 0
    assert starts(tmp_path) == ["start-0-0", "start-1-0", "start-2-0"]
    places = [json.loads((tmp_path / "run" / name).read_text(encoding="utf-8")) for name in starts(tmp_path)]
    assert [place["RANK"] for place in places] == [place["LOCAL_RANK"] for place in places] == ["0", "1", "2"]
    assert {(place["WORLD_SIZE"], place["MASTER_ADDR"]) for place in places} == {("3", "127.0.0.1")}
    assert len({place["MASTER_PORT"] for place in places}) == 1


@pytest.mark.parametrize("rank", ["0", "1", "all"])
def test_the_users_error_is_one_message_and_exit_code_2(tmp_path, rank):
    code, lines = ended(start(tmp_path, "--processes", "2", misbehave=f"user:{rank}"))
    assert code == 2 and lines == ["holdfast: row 7 is wrong"]


def test_a_process_that_is_killed_stops_all(tmp_path):
    code, lines = ended(start(tmp_path, "--processes", "2", misbehave="kill:1"))
    assert code == 1
    assert lines[0] == "holdfast: process 1 of 2 was killed by SIGKILL; the others are stopped"


def test_a_bug_is_told_with_its_traceback(tmp_path):
    code, lines = ended(start(tmp_path, "--processes", "2", misbehave="bug:1"))
    assert code == 1
    assert lines[0] == "holdfast: process 1 of 2 failed:" and lines[-1] == "ZeroDivisionError: a bug"


def test_restarts_go_on_and_are_counted(tmp_path):
    code, lines = ended(start(tmp_path, "--processes", "2", "--max-restarts", "1", misbehave="kill once:1"))
    assert code == 0
    assert {"start-0-1", "start-1-0", "start-1-1"} <= set(starts(tmp_path))
    assert lines[-1] == "holdfast: starting again (1 of 1)"
    (tmp_path / "again").mkdir()
    code, lines = ended(start(tmp_path / "again", "--processes", "2", "--max-restarts", "1", misbehave="kill:0"))
    assert code == 1 and sum("was killed by SIGKILL" in line for line in lines) == 2


def test_the_users_error_is_no_reason_to_start_again(tmp_path):
    code, _ = ended(start(tmp_path, "--processes", "1", "--max-restarts", "3", misbehave="user:0"))
    assert code == 2 and starts(tmp_path) == ["start-0-0"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_all_and_each_saves(tmp_path, number):
    process = start(tmp_path, "--processes", "2", misbehave="sleep:all")
    deadline = time.monotonic() + 100
    while len(list((tmp_path / "run").glob("ready-*"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    code, [*heard, line] = ended(process)
    assert code == 1 and any("a second Ctrl-C ends it at once" in said for said in heard) == (number == signal.SIGINT)
    assert re.fullmatch(r"holdfast: stopped in a test; all of it is saved\. Continue with: .* --processes 2", line)


def test_a_launcher_within_a_launcher_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, lines = ended(start(tmp_path, "--processes", "2"))
    assert code == 2 and "a launcher (torchrun, accelerate, deepspeed) has started" in lines[0]


def real(folder: Path, output: str, *arguments: str) -> subprocess.Popen[str]:
    """`holdfast run` of a tiny model that learns two tasks."""
    values = tiny_config(folder, tuner={"name": "lora", "lora_dropout": 0.0}, output=str(folder / output))
    values["stream"]["order"] = ["red", "blue"]
    values["training"] = {"max_steps": 60, "batch_size": 4, "learning_rate": 1e-2, "save_every": 5, "log_every": 1}
    path = folder / f"{output}.json"
    path.write_text(json.dumps(values), encoding="utf-8")
    return subprocess.Popen(
        [sys.executable, "-m", "holdfast", "run", str(path), *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(path: Path, pattern: str) -> None:
    deadline = time.monotonic() + 300
    while not list(path.glob(pattern)) and time.monotonic() < deadline:
        time.sleep(0.02)


def weights(folder: Path) -> str:
    return json.loads((folder / "stages" / "02-blue" / "stage.json").read_text(encoding="utf-8"))["weights"]


@pytest.mark.slow
def test_a_run_whose_process_is_killed_goes_on_and_ends_the_same(tmp_path):
    assert ended(real(tmp_path, "whole", "--processes", "2"))[0] == 0
    process = real(tmp_path, "killed", "--processes", "2", "--max-restarts", "1")
    wait_for(tmp_path / "killed", "stages/02-blue/checkpoint/checkpoint-*")
    second = psutil.Process(process.pid).children()[1]
    second.kill()
    code, lines = ended(process)
    assert code == 0, lines
    assert any("process 1 of 2 was killed by SIGKILL" in line for line in lines)
    assert weights(tmp_path / "killed") == weights(tmp_path / "whole")


@pytest.mark.slow
def test_a_run_that_is_interrupted_continues_with_another_number_of_processes(tmp_path):
    process = real(tmp_path, "run", "--processes", "2")
    wait_for(tmp_path / "run", "stages/01-red/checkpoint/checkpoint-*")
    process.send_signal(signal.SIGINT)
    code, lines = ended(process)
    assert code == 1 and "all of it is saved. Continue with:" in lines[-1], lines
    assert ended(real(tmp_path, "run"))[0] == 0
    assert ended(real(tmp_path, "alone"))[0] == 0
    scores = [
        json.loads((tmp_path / name / "matrix.json").read_text(encoding="utf-8"))["scores"] for name in ("run", "alone")
    ]
    assert scores[0] == scores[1]


@pytest.mark.slow
def test_torchrun_and_deepspeed_start_the_same_run(tmp_path):
    assert ended(real(tmp_path, "ours", "--processes", "2"))[0] == 0
    starters = {
        "torchrun": ["torch.distributed.run", "--nproc-per-node", "2", "-m"],
        "deepspeed": ["deepspeed.launcher.runner", "--num_gpus", "2", "--module"],
    }
    for name, command in starters.items():
        subprocess.run(
            [
                sys.executable,
                "-m",
                *command,
                "holdfast",
                "run",
                str(tmp_path / "ours.json"),
                f"output={tmp_path / name}",
            ],
            env=os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
            check=True,
            timeout=300,
        )
        assert weights(tmp_path / name) == weights(tmp_path / "ours")
