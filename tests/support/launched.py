"""Stands in for the processes of a run in tests of the launcher: each does what MISBEHAVE says, and loads no model."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import holdfast.cli
from holdfast.errors import DataError, Interrupted
from holdfast.system.interrupt import Interrupt

RANK = os.environ.get("RANK", "0")


def stand_in() -> None:
    """MISBEHAVE is WHAT:RANK; the other processes hang, as in a collective that one of them never joins."""
    folder = Path(json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))["output"])
    folder.mkdir(exist_ok=True)
    starts = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    place = {key: os.environ.get(key) for key in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}
    (folder / f"start-{RANK}-{starts}").write_text(json.dumps(place), encoding="utf-8")
    what, _, rank = os.environ.get("MISBEHAVE", "").partition(":")
    if what == "kill once" and starts:
        return
    if rank in (RANK, "all"):
        match what:
            case "kill" | "kill once":
                os.kill(os.getpid(), signal.SIGKILL)
            case "user":
                raise DataError("row 7 is wrong")
            case "bug":
                raise ZeroDivisionError("a bug")
            case "sleep":
                with Interrupt() as interrupt:
                    (folder / f"ready-{RANK}").touch()
                    while not interrupt.requested:
                        time.sleep(0.01)
                raise Interrupted("stopped in a test; all of it is saved")
    if what:
        time.sleep(600)


holdfast.cli.app = stand_in
holdfast.cli.main()
