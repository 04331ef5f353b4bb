"""How a run is doing, told by its files while another process writes them.

Whoever looks asks :meth:`Pulse.signature` first, which only looks at the files' dates. To read them takes the same time
however long the run is: of many logged steps some are read.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from holdfast.errors import RunDirectoryError, UserError
from holdfast.records.read import FinishedRun, read_run
from holdfast.records.shapes import read_json
from holdfast.system.files import LOCK, JsonError, parse_json

FILES = ("run.json", "matrix.json", "events.jsonl", "report.html")
LOCKS = Path("/proc/locks")
"""Linux says here which files are locked, without any of them being touched."""

WHOLE = 500_000
"""Bytes of logged steps that are read whole; of more, so many lines are."""
LINES = 800


@dataclass
class Beat:
    """What a run's files said at one moment.

    Attributes:
        record: run.json; None where there is none yet.
        run: with its score matrix; None where nothing was measured yet.
        events: logged steps in order, some of them where there are many.
        at_work: whether a process on this machine holds the run; None: this machine cannot tell.
        changed: when the files last changed, in seconds since 1970.
        pace: seconds a step; None where that is not known yet.
    """

    path: Path
    record: dict[str, Any] | None
    run: FinishedRun | None
    events: list[dict[str, Any]]
    at_work: bool | None
    changed: float
    pace: float | None = None

    @property
    def finished(self) -> bool:
        return self.record is not None and self.record.get("finished") is not None

    @property
    def tasks(self) -> list[str]:
        """Of all stages, in order."""
        assert self.record is not None
        names = list(self.record["tasks"])
        return ["joint"] if self.record["config"]["method"][0]["name"] == "joint" else names

    @property
    def steps(self) -> list[int] | None:
        """Optimizer steps of each stage, as planned; None: a run before 0.2, or none of its stages began."""
        planned = (self.record or {}).get("steps")
        return planned if planned and len(planned) == len(self.tasks) else None

    @cached_property
    def stage(self) -> int | None:
        """The stage that trains, from 1; None between stages."""
        begun = [] if self.record is None else self.record.get("stages", [])
        return next((stage["stage"] for stage in begun if stage["finished"] is None), None)

    @property
    def step(self) -> int:
        """The last logged step of the stage that trains; 0: none yet."""
        return max((event["step"] for event in self.events if event["stage"] == self.stage), default=0)

    @property
    def left(self) -> tuple[float | None, float | None]:
        """Seconds until the stage ends, and the run: evaluations take as long as the last one. None: not known."""
        if self.pace is None or self.stage is None or self.steps is None:
            return None, None
        stage = self.pace * max(self.steps[self.stage - 1] - self.step, 0)
        later = self.steps[self.stage :]
        return stage, stage + self.pace * sum(later) + (len(later) + 1) * self._evaluation

    @property
    def _evaluation(self) -> float:
        """Seconds of the last evaluation; 0 where its file cannot be read."""
        files = [] if self.run is None else [folder / "evaluation.json" for folder in self.run.folders.values()]
        measured = [file for file in files if file.exists()]
        try:
            return float(read_json(measured[-1])["seconds"]) if measured else 0.0
        except (UserError, OSError, LookupError, TypeError, ValueError):
            return 0.0


class Pulse:
    """Reads a run again and again.

    Args:
        path: its directory, which need not be there yet.
    """

    def __init__(self, path: Path):
        self.path = path
        self._run: FinishedRun | None = None
        self._read: tuple[Any, ...] = ()  # the signature of what _run was read from
        self._first: tuple[int, int, float] | None = None  # stage, step and when it was logged, as first seen

    def signature(self) -> tuple[Any, ...]:
        """What changes whenever the run's files do, or its process ends; it opens none of them."""
        at_work = self._at_work()
        minute = int(time.time() // 60) if at_work is None else None  # since the page then tells how long nothing came
        return (*(_facts(self.path / name) for name in FILES), at_work, minute)

    def read(self) -> Beat:
        """Read what changed.

        Raises:
            RunDirectoryError: a file is damaged, or just being replaced.
        """
        facts = [_facts(self.path / name) for name in FILES]
        record = read_json(self.path / "run.json") if facts[0] else None
        if record is not None and "tasks" not in record:
            raise RunDirectoryError(f"{self.path}: is a run of the laboratory, which has no score matrix to watch")
        if tuple(facts[:2]) != self._read:
            self._run = read_run(self.path) if facts[0] and facts[1] else None
            self._read = tuple(facts[:2])
        events = sampled_events(self.path / "events.jsonl") if facts[2] else []
        changed = max((found[0] for found in facts if found), default=0) / 1e9
        beat = Beat(self.path, record, self._run, events, self._at_work(), changed)
        if beat.stage is not None and beat.step and facts[2] is not None:
            beat.pace = self._pace(beat, facts[2][0] / 1e9)
        return beat

    def _pace(self, beat: Beat, logged: float) -> float | None:
        """Seconds a step since the first one that was seen of this stage, else since the stage began."""
        assert beat.record is not None and beat.stage is not None
        if self._first is None or self._first[0] != beat.stage or self._first[1] > beat.step:
            self._first = beat.stage, beat.step, logged
        _, step, since = self._first
        if beat.step > step:
            return max(logged - since, 0) / (beat.step - step)
        began = next(stage["started"] for stage in beat.record["stages"] if stage["stage"] == beat.stage)
        return max(logged - datetime.fromisoformat(began).timestamp(), 0) / beat.step if began else None

    def _at_work(self) -> bool | None:
        """Whether a process holds the run's lock; to try to take it could keep a run from beginning."""
        try:
            inode, held = (self.path / LOCK).stat().st_ino, LOCKS.read_text()
        except FileNotFoundError:
            return False if LOCKS.exists() else None
        except OSError:
            return None
        return any(line.split()[-3].rpartition(":")[2] == str(inode) for line in held.splitlines())


def _facts(path: Path) -> tuple[int, int, int] | None:
    """When a file was last written, its size and its place on the disk; None: there is no such file."""
    try:
        found = path.stat()
    except OSError:
        return None
    if not stat.S_ISREG(found.st_mode):
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


def sampled_events(path: Path, whole: int = WHOLE, lines: int = LINES) -> list[dict[str, Any]]:
    """Logged steps of a file that may just be growing, in order: all of them, or of a long file ``lines`` that lie
    evenly in it, and its last ones.

    A step that was logged twice counts as it was logged last; a line that is no whole event is left out.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size <= whole:
            found = file.read().split(b"\n")
        else:
            found = []
            for i in range(lines):
                file.seek(size * i // lines)
                file.readline()  # the rest of a line
                found.append(file.readline())
            file.seek(size - whole // 10)
            found += file.read().split(b"\n")[1:]
    events = {(event["stage"], event["step"]): event for event in map(_event, found) if event is not None}
    return [events[place] for place in sorted(events)]


def _event(line: bytes) -> dict[str, Any] | None:
    try:
        event = parse_json(line.decode())
    except (JsonError, UnicodeDecodeError):
        return None
    known = isinstance(event, dict) and _are(int, [event.get("stage"), event.get("step")])
    terms = event.get("terms") if known else None
    numbers = isinstance(terms, dict) and _are((int, float, type(None)), [event.get("loss"), *terms.values()])
    return event if numbers and isinstance(event.get("task"), str) else None


def _are(kind: Any, values: Sequence[Any]) -> bool:
    return all(isinstance(value, kind) and not isinstance(value, bool) for value in values)
