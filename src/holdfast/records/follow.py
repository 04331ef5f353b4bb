"""Trackers follow a run: all that its files say is sent to each of them, and nothing twice.

``trackers.json`` in the run's directory says what each tracker has. What could not be sent is sent later, from the
run's files, so that a tracker that was out of reach, or that was named later, gets everything from the first step on.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from holdfast.records.directory import REBUILD, RunDirectory
from holdfast.records.gate import StageFigures
from holdfast.records.read import FinishedRun, read_run
from holdfast.records.shapes import read_appended, read_json
from holdfast.records.trackers import TRACKERS, About, Axis, Tracker
from holdfast.system import files
from holdfast.system.files import is_finite, write_json

logger = logging.getLogger("holdfast")

STATE = "trackers.json"
FILES = {"events.jsonl": "train", "curves.jsonl": "during", "evaluations.jsonl": "during"}
"""The files that grow by a line at a step, and what the names of their values begin with."""


@dataclass(frozen=True)
class Part:
    """A point of several curves, and where it comes from.

    Attributes:
        at: the step on its axis.
        values: by the curve's name.
        file: the name of the file that grew by it; empty for what the score matrix and the gate say.
        place: stage and step of its line in the file.
    """

    axis: Axis
    at: int
    values: dict[str, float]
    file: str = ""
    place: tuple[int, ...] = ()


class Followers:
    """The trackers of a run, on the rank that writes. Without names it does nothing.

    Args:
        about: the run.
        names: of the trackers.
    """

    def __init__(self, about: About, names: Sequence[str] = ()):
        self._root = about.root
        state = read_json(about.root / STATE) if names and (about.root / STATE).exists() else {}
        self._state: dict[str, Any] = state
        self._followers = [_Follower(name, about, self._state.setdefault(name, {}), self._write) for name in names]
        self._steps: dict[int, int] = {}  # the last step of each stage

    def __bool__(self) -> bool:
        return bool(self._followers)

    def begin(self) -> None:
        """Begin the tracker runs, or go on with them, so that a login that is wrong is told of before anything else."""
        for follower in self._followers:
            follower.begin()

    def line(self, path: Path, line: Mapping[str, Any]) -> None:
        """Send a line that was added to one of the files just now."""
        if not self._followers:
            return
        part = self._part(path.name, line)
        for follower in self._followers:
            if not follower.behind:
                follower.send([part], [])

    def catch_up(self) -> None:
        """Send all that the files say and a tracker does not have: call it where the last stage is judged."""
        if not self._followers:
            return
        of_tasks = (self._root / "matrix.json").exists()  # the laboratory's runs have none
        read = read_appended if of_tasks else files.read_appended
        lines = [self._part(name, line) for name in FILES for line in read(self._root / name)]
        stages = list(stage_points(self._root)) if of_tasks else []
        for follower in self._followers:
            follower.send(lines, stages)

    def report(self, path: Path) -> None:
        """Send the run's page, unless a tracker has it as it is."""
        for follower in self._followers:
            follower.report(path)

    def close(self, done: bool) -> None:
        """End what was begun; ``done``: the run was not stopped."""
        for follower in self._followers:
            follower.close(done)

    def _part(self, file: str, line: Mapping[str, Any]) -> Part:
        stage, step = line.get("stage", 0), line["step"]
        self._steps[stage] = max(step, self._steps.get(stage, 0))
        before = sum(last for earlier, last in self._steps.items() if earlier < stage)
        numbers = {key: value for key, value in line.items() if key not in ("stage", "step", "task")}
        return Part("train", before + step, dict(_numbers(FILES[file], numbers)), file, (stage, step))

    def _write(self) -> None:
        write_json(self._root / STATE, self._state)


@contextlib.contextmanager
def followed(directory: RunDirectory, config: Any, names: Sequence[str]) -> Iterator[Followers]:
    """The trackers of a run whose run.json is there, which end with the context.

    Args:
        config: of a run or a laboratory run.
        names: of the trackers; on other ranks than 0 there is none.
    """
    options = config.training.arguments
    name = options.get("run_name") or directory.path.resolve().name.removesuffix(REBUILD)
    about = About(directory.path, name, directory.record["config"], options)
    followers = Followers(about, names if directory.process.main else ())
    done = False
    try:
        yield followers
        done = True
    finally:
        followers.close(done)


def anew(root: Path) -> dict[str, Any]:
    """What trackers.json says where a run is made again: nothing is sent yet, and its tracker runs get no more."""
    state = read_json(root / STATE) if (root / STATE).exists() else {}
    runs = {name: [*sent.get("former", []), *filter(None, [sent.get("run")])] for name, sent in state.items()}
    return {name: {"former": former} for name, former in runs.items()}


class _Follower:
    """One tracker of a run.

    Attributes:
        behind: whether it lacks more than the next line, because it was out of reach, or was not asked yet.
    """

    def __init__(self, name: str, about: About, sent: dict[str, Any], write: Callable[[], None]):
        self.name, self.behind = name, True
        self._about, self._sent, self._write = about, sent, write
        self._tracker: Tracker | None = None
        self._told = ""  # why it was not reached

    def begin(self) -> Tracker | None:
        """Begin the tracker run, or go on with it; None if it is out of reach."""
        if self._tracker is None:
            with self._warning():
                about = replace(self._about, former=self._sent.get("former", []))
                self._tracker = TRACKERS[self.name](about, self._sent.get("run"))
                self._sent["run"] = self._tracker.run
                self._write()
        return self._tracker

    def send(self, lines: Iterable[Part], stages: Iterable[Part]) -> None:
        """Send the points that the tracker does not have.

        What it has is noted before it is sent: after a kill between both a point may be missing, but none is there
        twice. What could not be sent is no longer noted.
        """
        parts = list(_lacking(self._sent, lines, stages))
        tracker = self.begin() if parts else None
        self.behind = bool(parts)
        if tracker is None:
            return
        before, reached = copy.deepcopy(self._sent), 0
        _note(self._sent, parts)
        self._write()
        with self._warning():
            for part in parts:
                tracker.log(part.axis, part.at, part.values)
                reached += 1
        self.behind = reached < len(parts)
        if self.behind:
            _note(before, parts[:reached])
            self._sent.update(before)
            self._write()

    def report(self, path: Path) -> None:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        if self._sent.get("report") != digest and (tracker := self.begin()) is not None:
            with self._warning():
                tracker.artifact(path)
                self._sent["report"] = digest
                self._write()

    def close(self, done: bool) -> None:
        tracker, self._tracker = self._tracker, None
        if tracker is not None:
            with self._warning():
                tracker.close(done)

    @contextlib.contextmanager
    def _warning(self) -> Iterator[None]:
        """Warn of an error, once, and go on: a run does not end because a tracker is out of reach."""
        try:
            yield
        except Exception as error:  # of any kind: each tracker has its own
            if (why := f"{error}".strip() or repr(error)) != self._told:
                logger.warning("%s: not reached, the run goes on without it for now: %s", self.name, why)
            self._told = why


def _lacking(sent: Mapping[str, Any], lines: Iterable[Part], stages: Iterable[Part]) -> Iterator[Part]:
    """The points that a tracker does not have."""
    last = {file: tuple(place) for file, place in sent.get("lines", {}).items()}
    for part in lines:
        if part.place > last.get(part.file, ()):
            last[part.file] = part.place
            yield part
    has = sent.get("stages", {})
    for part in stages:
        if new := {name: value for name, value in part.values.items() if part.at not in has.get(name, [])}:
            yield replace(part, values=new)


def _note(sent: dict[str, Any], parts: Iterable[Part]) -> None:
    """Note that a tracker has these points."""
    lines, stages = sent.setdefault("lines", {}), sent.setdefault("stages", {})
    for part in parts:
        if part.file:
            lines[part.file] = list(part.place)
        for name in () if part.file else part.values:
            stages.setdefault(name, []).append(part.at)


def stage_points(root: Path) -> Iterator[Part]:
    """What each measured row of the score matrix says, as points: scores, figures as if the stream had ended there,
    what was learned and forgotten of each task, general abilities, and what the gate checked and decided.

    Args:
        root: a run's directory.
    """
    run = read_run(root)
    decisions = {decision["stage"]: decision for decision in run.info.get("gate", [])}
    for row, scores in enumerate(run.scores):
        values = {f"score/{task}": score for task, score in zip(run.tasks, scores, strict=True)}
        values |= {f"general/{name}": column[row] for name, column in run.matrix["general"].items()}
        if row and any(score is not None for score in scores):
            values |= _figures(run, row)
        if decision := decisions.get(1 if run.joint and row == len(run.tasks) else row if not run.joint else 0):
            values["gate/passed"] = float(decision["passed"])
            for check in decision["checks"]:
                values[f"gate/{check['figure']}"] = check.get("value")
                values[f"gate/{check['figure']} limit"] = check.get("limit")
        if found := {name: value for name, value in values.items() if value is not None}:
            yield Part("stage", row, found)


def _figures(run: FinishedRun, row: int) -> dict[str, float | None]:
    """The figures of the tasks learned by a row."""
    figures = StageFigures(run, row)
    values = {f"figure/{name}": value for name, value in figures.summary.items()}
    for name, tasks in (("learned", figures.tasks[-1:]), ("forgetting", figures.tasks[:-1])):
        values |= {f"{name}/{task}": figures.by_task[name][figures.tasks.index(task)] for task in tasks}
    return values


def _numbers(name: str, value: Any) -> Iterator[tuple[str, float]]:
    """The finite numbers in a JSON value, by their path."""
    if isinstance(value, Mapping):
        for key, below in value.items():
            yield from _numbers(f"{name}/{key}", below)
    elif isinstance(value, int | float) and is_finite(value):
        yield name, float(value)
