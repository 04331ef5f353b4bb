"""Work that several processes share: results in the order of the parts, and no process outlives the one that asked."""

from __future__ import annotations

import multiprocessing
import signal
import subprocess
import sys
import time

import psutil
import pytest

from holdfast.system.workers import in_order

DIES = """
import multiprocessing, os, signal
from holdfast.system.workers import in_order
for part, _ in in_order(range(50), lambda: lambda number: number, 3, given=lambda number: number, start="fork"):
    if part == 9:
        print(*[child.pid for child in multiprocessing.active_children()], flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
"""


def ended(process: int) -> bool:
    try:
        return psutil.Process(process).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.mark.parametrize("processes", [1, 2, 5])
def test_results_come_in_the_order_of_the_parts(processes: int):
    made = in_order("abcdefg", lambda: str.upper, processes, given=lambda part: part * 2, start="fork")
    assert list(made) == [(part, part.upper() * 2) for part in "abcdefg"]
    assert not multiprocessing.active_children()


def test_forked_processes_end_where_the_first_one_is_killed():
    done = subprocess.run([sys.executable, "-c", DIES], check=False, stdout=subprocess.PIPE, text=True)
    workers = [int(process) for process in done.stdout.split()]
    assert done.returncode == -signal.SIGKILL and len(workers) == 3
    deadline = time.monotonic() + 30
    while not all(map(ended, workers)):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_what_the_work_raises_is_raised_and_a_killed_process_is_reported():
    with pytest.raises(ZeroDivisionError):
        list(in_order(range(3, -3, -1), lambda: lambda number: 1 / number, 2, given=lambda part: part, start="fork"))

    def parts():
        for number in range(4):
            for process in multiprocessing.active_children():
                process.kill()
            yield number

    with pytest.raises(RuntimeError, match="ended with exit code -9"):
        list(in_order(parts(), lambda: str, 2, given=lambda part: part, start="fork"))
    assert not multiprocessing.active_children()
