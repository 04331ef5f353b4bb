"""Several processes of one command on this machine, started together and stopped together.

torchrun's agent waits half a minute for processes that hang since another one died, and cannot tell them that from a
person's Ctrl-C; so holdfast starts its processes on one machine itself, with the environment that torchrun gives them.
"""

from __future__ import annotations

import math
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from holdfast.errors import GateFailed, Interrupted, ProcessFailed, UserError
from holdfast.system.files import read_json, write_json
from holdfast.system.interrupt import Interrupt

ERRORS = "HOLDFAST_ERROR_FILE"
"""Environment variable: where a process leaves its error to this module."""

TOLD = {kind.__name__: kind for kind in (UserError, GateFailed, Interrupted)}
"""Errors that need no traceback, and are raised again as what they are."""

COMMAND = [sys.executable, "-m", "holdfast"]

POLL = 0.05
"""Seconds between looks at the processes."""

LEAVING = 30.0
"""Seconds that the others have to leave, once one has, of a run that was asked to stop."""

LAST_LINES = 20
"""Lines shown of what a process said that died without an error of its own."""


def launch(arguments: Sequence[str], processes: int, max_restarts: int = 0, quiet: bool = False) -> None:
    """Run ``holdfast ARGUMENTS`` in processes that train together, and return when all are done.

    Process 0 shows its output here; of the others only the error is shown of which the run died. SIGINT and SIGTERM
    are handed on once, so that the run saves and leaves; a second one ends it at once.

    Args:
        max_restarts: how often all are started again where one died of something other than the user's input; they
            go on from the last checkpoint.
        quiet: keep process 0's output from the terminal, too.

    Raises:
        UserError, GateFailed, Interrupted: as a process raised it.
        ProcessFailed: a process died otherwise; the message is its own error, or how it ended.
    """
    for restart in range(max_restarts + 1):
        with tempfile.TemporaryDirectory(prefix="holdfast-") as folder, Interrupt() as interrupt:
            group = _Group(arguments, processes, restart, Path(folder), quiet)
            try:
                failed = group.wait(interrupt)
            finally:
                group.kill()
            if failed is None:
                return
            error = group.error(failed)
        if not isinstance(error, ProcessFailed) or interrupt.requested or restart == max_restarts:
            raise error
        print(f"holdfast: {error}\nholdfast: starting again ({restart + 1} of {max_restarts})", file=sys.stderr)


def launched() -> bool:
    """Whether a launcher has started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def tell_launcher(error: Exception) -> bool:
    """Leave an error to the process that launched this one; False where there is none."""
    if ERRORS not in os.environ:
        return False
    kind = next((name for name, kind in TOLD.items() if isinstance(error, kind)), None)
    text = str(error) if kind else "".join(traceback.format_exception(error)).rstrip()
    write_json(Path(os.environ[ERRORS]), {"kind": kind, "text": text, "time": time.time()})
    return True


class _Group:
    """The processes of one start."""

    def __init__(self, arguments: Sequence[str], processes: int, restart: int, folder: Path, quiet: bool):
        self.folder = folder
        self.processes: list[subprocess.Popen[bytes]] = []
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        common = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, cores // processes)))}
        common["TORCHELASTIC_RESTART_COUNT"] = str(restart)
        if processes > 1:
            common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
            common |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
        for rank in range(processes):
            own = {ERRORS: str(self._errors(rank))}
            own |= {"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}
            log: IO[bytes] | None = self._log(rank).open("wb") if rank or quiet else None
            self.processes.append(
                subprocess.Popen(
                    [*COMMAND, *arguments],
                    env=os.environ | common | own,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,  # Ctrl-C comes through this process, once
                )
            )

    def wait(self, interrupt: Interrupt) -> dict[int, int] | None:
        """Until all are done or one failed: None, or {rank: exit code} of those that failed."""
        asked, end = False, math.inf
        while True:
            codes = {rank: process.poll() for rank, process in enumerate(self.processes)}
            failed = {rank: code for rank, code in codes.items() if code}
            if failed:
                end = min(end, time.monotonic() + (LEAVING if asked else 0))
            if None not in codes.values() or time.monotonic() > end:
                return failed or None
            if interrupt.requested and not asked:
                asked = True
                self._signal(signal.SIGTERM)
            time.sleep(POLL)

    def kill(self) -> None:
        """End what is left of them, and of the processes that they started."""
        self._signal(signal.SIGKILL)
        for process in self.processes:
            process.wait()

    def error(self, failed: dict[int, int]) -> Exception:
        """Why the run died: of a process that was killed, else the first error that one told, a user's before others'.

        The others' errors follow from it: they lost a peer.
        """
        told = [read_json(path) | {"rank": rank} for rank in failed if (path := self._errors(rank)).exists()]
        silent = [rank for rank in failed if rank not in (error["rank"] for error in told)]
        if silent and not any(error["kind"] for error in told):
            rank, code = silent[0], failed[silent[0]]
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            log = self._log(rank)
            said = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
            lines = "".join(f"\n  {line}" for line in said.splitlines()[-LAST_LINES:])
            return ProcessFailed(f"process {rank} of {len(self.processes)} {how}; the others are stopped{lines}")
        first = min(told, key=lambda error: (error["kind"] is None, error["time"]))
        if first["kind"]:
            return TOLD[first["kind"]](first["text"])
        return ProcessFailed(f"process {first['rank']} of {len(self.processes)} failed:\n{first['text']}")

    def _signal(self, number: signal.Signals) -> None:
        for process in self.processes:
            try:
                os.killpg(process.pid, number)
            except ProcessLookupError:
                continue

    def _errors(self, rank: int) -> Path:
        return self.folder / f"error-{rank}.json"

    def _log(self, rank: int) -> Path:
        return self.folder / f"log-{rank}.txt"


def free_port() -> int:
    """A TCP port of this machine that nothing listens on."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])
