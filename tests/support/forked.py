"""Python processes that start at once: forks of a server that has imported what training needs.

A new interpreter spends five seconds on imports. A fork is a process of its own all the same: it can be killed, it gets
signals, and it has its own standard output and errors.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from holdfast.system.machine import free_port

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["support.preloaded"])


class Process:
    """What tests use of ``subprocess.Popen``; both outputs are files."""

    def __init__(self, arguments: tuple[str, ...], environment: Mapping[str, str]):
        self.output, self.errors = (Path(tempfile.mkstemp()[1]) for _ in range(2))
        self.arguments = arguments
        self.process = SERVER.Process(target=_become, args=(arguments, dict(environment), self.output, self.errors))
        self.process.start()

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        self.process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.arguments, timeout or 0)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        self.wait(timeout)
        return self.output.read_text(encoding="utf-8"), self.errors.read_text(encoding="utf-8")

    def send_signal(self, number: int) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def kill(self) -> None:
        self.process.kill()


def start(*arguments: object, **environment: str) -> Process:
    """``python ARGUMENTS``: ``-m MODULE ...``, ``-c CODE ...`` or ``SCRIPT ...``, with more environment variables."""
    return Process(tuple(map(str, arguments)), os.environ | environment)


def start_together(count: int, *arguments: object, **environment: str) -> list[Process]:
    """As ``start``, in processes that train together; no launcher ends the others when one has ended."""
    world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(count)}
    world |= {"LOCAL_WORLD_SIZE": str(count), "DS_ACCELERATOR": "cpu"}
    return [start(*arguments, **environment, **world, RANK=str(n), LOCAL_RANK=str(n)) for n in range(count)]


def run(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """As ``start``, to its end."""
    process = start(*arguments, **environment)
    output, errors = process.communicate()
    return subprocess.CompletedProcess(process.arguments, process.wait(), output, errors)


def _become(arguments: tuple[str, ...], environment: dict[str, str], output: Path, errors: Path) -> None:
    for number, path in ((1, output), (2, errors)):
        with path.open("w") as file:
            os.dup2(file.fileno(), number)
    os.environ.clear()
    os.environ.update(environment)
    if arguments[0] == "-m":
        sys.argv = ["", *arguments[2:]]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    elif arguments[0] == "-c":
        sys.argv = ["-c", *arguments[2:]]
        exec(arguments[1], {"__name__": "__main__"})
    else:
        sys.argv = list(arguments)
        runpy.run_path(arguments[0], run_name="__main__")
