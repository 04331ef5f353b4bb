"""Start several processes of one command on this machine, and stop them together.

holdfast starts them itself, with the environment that torchrun would give them. torchrun's agent waits half a minute
for processes that hang because another one died, and does the same after a person's Ctrl-C.
"""

from __future__ import annotations

import math
import os
import signal
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
from holdfast.system.machine import cores, free_port
from holdfast.system.pool import exit_in_words
from holdfast.system.terminal import say

ERRORS = "HOLDFAST_ERROR_FILE"
"""Environment variable: the file in which a process leaves its error for this module."""

TOLD = {kind.__name__: kind for kind in (UserError, GateFailed, Interrupted)}
"""Errors that need no traceback. They are raised again here, as the same kind."""

COMMAND = [sys.executable, "-m", "holdfast"]

POLL = 0.05
"""Seconds between looks at the processes."""

LEAVING = 30.0
"""Seconds that the other processes have to end, once one has, after the run was asked to stop."""

LAST_LINES = 20
"""Lines that are shown of the output of a process that died without an error of its own."""


def launch(arguments: Sequence[str], processes: int, max_restarts: int = 0, quiet: bool = False) -> None:
    """Run ``holdfast ARGUMENTS`` in processes that train together, and return when all are done.

    Rank 0 shows its output here; of the other ranks, only the error that ended the run is shown. SIGINT and SIGTERM are
    passed on once, so that the run saves and ends; a second signal ends it at once.

    Args:
        arguments: of the command line.
        processes: how many.
        max_restarts: how often all are started again from the last checkpoint if one died of anything but the user's
            input.
        quiet: hide the output of rank 0, too.

    Raises:
        UserError, GateFailed, Interrupted: a process raised it.
        ProcessFailed: a process died otherwise; the message is its error, or how it ended.
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
        say(f"holdfast: {error}\nholdfast: starting again ({restart + 1} of {max_restarts})", file=sys.stderr)


def launched() -> bool:
    """Whether a launcher started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def tell_launcher(error: Exception) -> bool:
    """Leave an error for the process that launched this one; False if none did."""
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
        common = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, cores() // processes)))}
        common["TORCHELASTIC_RESTART_COUNT"] = str(restart)
        if processes > 1:
            common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
            common |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
        for rank in range(processes):
            place = {ERRORS: str(self._errors(rank))}
            place |= {"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}
            log: IO[bytes] | None = self._log(rank).open("wb") if rank or quiet else None
            self.processes.append(
                subprocess.Popen(
                    [*COMMAND, *arguments],
                    env=os.environ | common | place,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,  # Ctrl-C reaches it through this process, once
                )
            )

    def wait(self, interrupt: Interrupt) -> dict[int, int] | None:
        """Wait until all are done or one failed.

        Returns:
            None, or the exit codes of those that failed, {rank: exit code}.
        """
        stopping, end = False, math.inf
        while True:
            codes = {rank: process.poll() for rank, process in enumerate(self.processes)}
            failed = {rank: code for rank, code in codes.items() if code}
            if failed:
                end = min(end, time.monotonic() + (LEAVING if stopping else 0))
            if None not in codes.values() or time.monotonic() > end:
                return failed or None
            if interrupt.requested and not stopping:
                stopping = True
                self._signal(signal.SIGTERM)
            time.sleep(POLL)

    def kill(self) -> None:
        """End those that are left, and the processes that they started."""
        self._signal(signal.SIGKILL)
        for process in self.processes:
            process.wait()

    def error(self, failed: dict[int, int]) -> Exception:
        """The error that ended the run. The errors of the other ranks follow from it, since they lost a peer.

        A user's error counts before a process that died without a word, and that before any other error.
        """
        errors = [read_json(path) | {"rank": rank} for rank in failed if (path := self._errors(rank)).exists()]
        silent = [rank for rank in failed if rank not in [error["rank"] for error in errors]]
        if silent and not any(error["kind"] for error in errors):
            rank, log = silent[0], self._log(silent[0])
            output = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
            lines = "".join(f"\n  {line}" for line in output.splitlines()[-LAST_LINES:])
            how = exit_in_words(failed[rank])
            return ProcessFailed(f"process {rank} of {len(self.processes)} {how}; the others are stopped{lines}")
        first = min(errors, key=lambda error: (error["kind"] is None, error["time"]))
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
