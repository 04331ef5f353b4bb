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

import pytest

HERE = Path(__file__).parent
STARTER = """
import sys, holdfast.cli, holdfast.launch
holdfast.launch.COMMAND = [sys.executable, {stand_in!r}]
holdfast.cli.main()
"""


def start(folder: Path, *arguments: str, misbehave: str = "") -> subprocess.Popen[str]:
    """`holdfast run`, whose processes are stand-ins that load no model."""
    path = folder / "run.json"
    values = {"model": "none", "stream": {"path": "none"}, "output": str(folder / "run")}
    path.write_text(json.dumps(values), encoding="utf-8")
    code = STARTER.format(stand_in=str(HERE / "launched.py"))
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
    code, [line] = ended(process)
    assert code == 1
    assert re.fullmatch(r"holdfast: stopped in a test; all of it is saved\. Continue with: .* --processes 2", line)


def test_a_launcher_within_a_launcher_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, lines = ended(start(tmp_path, "--processes", "2"))
    assert code == 2 and "a launcher (torchrun, accelerate, deepspeed) has started" in lines[0]
