"""A run's directory: its lock, its files, and run.json, which says what the run is and how far it has come."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import logging
import os
import shlex
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from holdfast.config.section import Section
from holdfast.engines.process import Process
from holdfast.errors import RunDirectoryError
from holdfast.records.former import with_former_defaults
from holdfast.records.growth import (
    Past,
    not_begun,
    not_finished,
    of_training,
    recorded_stages,
    starts_with,
    unexplained,
)
from holdfast.records.inputs import Inputs, data_changes, input_changes, listed, other_measures, version_changes
from holdfast.records.shapes import read_appended, read_json
from holdfast.system.files import LOCK, json_file, jsonl_file, locked_folder, whole_folder, write_jsonl
from holdfast.system.machine import hardware, versions
from holdfast.system.manifest import MANIFEST, folder_facts, note, write_noted

logger = logging.getLogger("holdfast")

COST = ("seconds", "tokens", "peak_memory_gib")
"""What run.json says of the cost of a finished run."""

LEARN = "learn.json"
"""The state of a run that learns what it is given (:mod:`holdfast.records.kept`), which is there before run.json."""

REBUILD = ".rebuild"
"""What stands after the name of a run while it is made again beside the old one."""

LONGEST_NAME = 230
"""Bytes of a file's name, beside its endings."""


class RunDirectory:
    """The files of one run, as :func:`open_directory` opens them.

    Every rank has one. Rank 0 writes, and the others wait until it has. All that it writes whole is noted in the
    directory's manifest (:mod:`holdfast.system.manifest`).

    Attributes:
        record: the content of run.json; empty before the run begins.
    """

    def __init__(self, path: Path):
        self.path = path
        self.process = Process.this()
        self.record: dict[str, Any] = {}
        if (path / "run.json").exists():
            self.record = with_former_defaults(read_json(path / "run.json"))

    def begin(
        self,
        config: Section,
        facts: dict[str, Any],
        *,
        data: str = "tasks",
        inputs: Inputs | None = None,
        accept_changes: bool = False,
        recorded: dict[str, Any] | None = None,
    ) -> None:
        """Write run.json; if it is there, check that it belongs to the same run.

        Args:
            config: of a run or a laboratory run.
            facts: further content of run.json; ``facts[data]`` gives each piece of data by name, with its
                ``fingerprint``.
            inputs: what the numbers depend on beside the data.
            accept_changes: go on with other data and inputs; run.json lists what changed, and when.
            recorded: the same facts of the tasks that the run had before, where others are appended.

        Raises:
            RunDirectoryError: the data, the stream's prompts or metrics, or the inputs are not those that the run began
                with.
        """
        world, values, inputs = self.process.world, config.model_dump(mode="json"), inputs or {}
        if not self.record:
            self.record = {
                "config": values,
                "seed": values["seed"],
                "versions": versions(),
                "hardware": hardware(),
                "engine": values["training"]["engine"] or ("single" if world == 1 else "ddp"),
                "processes": world,
                "commit": _commit(),
                "started": _now(),
                "finished": None,
                "inputs": inputs,
            } | facts
            if data == "tasks":
                self.record["stages"] = []
            self.write()
            return
        before = dict(self.record)
        if data == "tasks":
            self.record["stages"] = recorded_stages(self.path, self.record)  # each with the configuration that it had
        now, facts = facts, facts if recorded is None else recorded
        lines = data_changes(self.record, facts, data) + input_changes(self.record.get("inputs", {}), inputs)
        if lines and not accept_changes:
            raise RunDirectoryError(
                f"{self.path}: its numbers depend on what changed since this run began:{listed(lines)}\n"
                f"put the old ones back, or give {self._elsewhere}; --accept-changes goes on all the same, with "
                "numbers that cannot be compared with those before"
            )
        if lines and (bars := other_measures(self.record, facts, inputs, data)):
            raise RunDirectoryError(
                f"{self.path}: its results before and after would not fit together:{listed(bars)}\n"
                f"put the old ones back, or give {self._elsewhere}; --accept-changes cannot bridge this"
            )
        if lines:
            logger.warning("%s: goes on with what changed since this run began:%s", self.path, listed(lines))
            self.record |= facts | {"changes": [*self.record.get("changes", []), {"at": _now(), "accepted": lines}]}
        self.record["inputs"] = self.record.get("inputs", {}) | inputs
        self._compare_versions()
        self.record["config"] = values  # they differ in keys that may change
        if recorded is not None:
            self._grow(now)
        if self.record != before:
            self.write()

    def go_back(self, after: int, to: int) -> None:
        """Note in run.json that after stage ``after`` the run holds the weights of stage ``to``."""
        self.record["rollbacks"] = [*self.record.get("rollbacks", []), {"after": after, "to": to, "at": _now()}]
        self.write()

    def _grow(self, facts: dict[str, Any]) -> None:
        """Note the appended tasks; the run is no longer finished."""
        names = [name for name in facts["tasks"] if name not in self.record["tasks"]]
        growth = {"after": len(self.past().finished), "tasks": names, "at": _now()}
        self.record |= facts | {"grown": [*self.record.get("grown", []), growth]}
        self._reopen()

    def _reopen(self) -> None:
        self.record["finished"] = None
        for key in COST:
            self.record.pop(key, None)

    def _compare_versions(self) -> None:
        """Warn of libraries that are not those that the run began with, and note them in run.json once."""
        lines = version_changes(self.record.get("versions", {}), versions())
        if not lines:
            return
        logger.warning(
            "%s: began with other versions (%s); numbers may differ from those of a run that stayed with one version",
            self.path,
            ", ".join(lines),
        )
        changes = self.record.get("changes", [])
        if not any(change.get("versions") == lines for change in changes):
            self.record["changes"] = [*changes, {"at": _now(), "versions": lines}]

    def check_config(self, config: Section, *, learns: bool = False) -> None:
        """Check that no run with another configuration began here, as far as the configuration alone shows it: see
        :meth:`appended`.

        Args:
            learns: whether `holdfast learn` goes on here, not a user's configuration.

        Raises:
            RunDirectoryError: one did; the message lists the differences, or says that learn has taken the run over.
        """
        lines = unexplained(self.record, config) if self.record else []
        if not learns and self._learns and (lines or not self.record):
            raise RunDirectoryError(
                f"{self.path}: this run is continued by learn now; go on with holdfast learn DATA --into "
                f"{shlex.quote(str(self.path))}"
            )
        if lines:
            raise self._other(lines)

    def past(self) -> Past:
        """What the run did before this start."""
        return Past.of(self.path, self.record)

    def appended(self, config: Section, tasks: Sequence[str]) -> list[str]:
        """The tasks of a stream that are new to the run.

        Args:
            tasks: all of the stream's, in order.

        Raises:
            RunDirectoryError: the recorded tasks are not the first of these, or settings of training differ although no
                stage is new, or not all of those before the new ones are finished.
        """
        if not self.record:
            return []
        known = list(self.record["tasks"])
        if not starts_with(tasks, known):
            raise self._other(
                [f"tasks: {', '.join(known)} -> {', '.join(tasks)}"],
                "tasks can only be appended after those that the run has (stream.order says the order)",
            )
        new = list(tasks[len(known) :])
        if lines := of_training(self.record, config):
            free = [*not_begun(self.path, self.record), *new]
            left = [name for name in not_finished(self.path, self.record) if name not in free]
            if left and free:
                why = f"settings of training may differ for new stages once those of {', '.join(left)} are finished"
                raise self._other(lines, why)
            if not free:
                raise self._other(lines)
        return new

    def _other(self, lines: list[str], why: str = "") -> RunDirectoryError:
        advice = f"give {self._elsewhere}, or the old values to continue that run"
        if self._learns:
            advice = (
                "after the first call of learn only gate may change, and training for data whose stage has not begun; "
                f"leave all else out, or give {self._elsewhere}"
            )
        return RunDirectoryError(
            f"{self.path}: holds a run with another configuration:{listed(lines)}\n{why}{'; ' if why else ''}{advice}"
        )

    @property
    def _learns(self) -> bool:
        return (self.path / LEARN).is_file()

    @property
    def _elsewhere(self) -> str:
        """What a user gives to begin a run of its own."""
        return "--into another directory" if self._learns else "another output"

    def begin_stage(self, stage: int, task: str, config: Section, fingerprint: str) -> None:
        """Note that the training of a stage begins, unless it goes on from a checkpoint; all ranks call this.

        Args:
            config: the stage's own.
            fingerprint: of its data.
        """
        others = [entry for entry in self.record["stages"] if entry["stage"] != stage]
        if len(others) < len(self.record["stages"]) and self.exists(self.stage(stage, task) / "checkpoint"):
            return
        entry = {"stage": stage, "task": task, "config": config.model_dump(mode="json")}
        entry |= {"fingerprint": fingerprint, "versions": versions(), "started": _now(), "finished": None}
        self.record["stages"] = [*others, entry]
        self.write()

    def end_stages(self, done: Sequence[int]) -> None:
        """Note that the training of stages is finished, unless that is noted; all ranks call this."""
        ended = [entry for entry in self.record["stages"] if entry["stage"] in done and entry["finished"] is None]
        for entry in ended:
            entry["finished"] = _now()
        if ended:
            self.write()

    def reopen(self) -> None:
        """Take back that the run is complete; all ranks call this."""
        if self.record.get("finished") is not None:
            self._reopen()
            self.write()

    def finish(self, cost: Mapping[str, Any]) -> None:
        """Note in run.json that the run is complete, and what it cost."""
        if self.record.get("finished") is None:
            self.record |= {"finished": _now()} | dict(cost)
            self.write()

    def way_to(self, model: str) -> str | None:
        """The path from here to a model's folder or file, which stays right if both are moved together; None: a hub
        name."""
        return os.path.relpath(Path(model).absolute(), self.path.resolve()) if Path(model).exists() else None

    def write(self) -> None:
        """Write run.json; all ranks call this."""
        self.write_json(self.path / "run.json", self.record)

    def exists(self, path: Path) -> bool:
        """Whether rank 0 finds a file; all ranks call this."""
        return self.process.broadcast(path.exists())

    def write_json(self, path: Path, value: Any) -> None:
        """Write a JSON file; all ranks call this."""
        if self.process.main:
            write_noted(self.path, path, json_file(value))
        self.process.wait()

    def write_jsonl(self, path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write a JSON-lines file; all ranks call this."""
        if self.process.main:
            write_noted(self.path, path, jsonl_file(rows))
        self.process.wait()

    @contextlib.contextmanager
    def whole_folder(self, path: Path) -> Iterator[Path]:
        """Give a temporary folder to fill, which becomes ``path``; all ranks call this, and rank 0 writes."""
        if self.process.main:
            with whole_folder(path) as partial:
                yield partial
                note(self.path, path, folder_facts(partial))
        else:
            with tempfile.TemporaryDirectory() as scratch:  # some libraries make or list the folder on every rank
                yield Path(scratch)
        self.process.wait()

    def stage(self, index: int, name: str) -> Path:
        """The folder of a stage; index 0 is before training."""
        return self.path / "stages" / f"{index:02d}-{slug(name)}"

    def trim_events(self, stage: int, step: float) -> None:
        """Drop the events and curves after a step of a stage, since a resumed run writes them again."""
        for name in ("events.jsonl", "curves.jsonl"):
            path = self.path / name
            if path.exists() and self.process.main:
                lines = [line for line in read_appended(path) if (line["stage"], line["step"]) <= (stage, step)]
                write_jsonl(path, lines)
        self.process.wait()


@contextlib.contextmanager
def open_directory(path: Path) -> Iterator[RunDirectory]:
    """Make the directory if it is new, and hold its lock.

    Raises:
        RunDirectoryError: it is a file, cannot be written, holds other files, or is in use by another process; or the
            disk is full.
    """
    process = Process.this()
    if not process.main:
        process.wait()
        yield RunDirectory(path)
        return
    check_free(path)
    with locked_folder(path):
        _refuse_other_files(path)
        process.wait()
        yield RunDirectory(path)


def check_directory(path: Path, config: Section) -> RunDirectory | None:
    """Check, without a lock and without making it, that a run of this configuration can begin or go on here, as far as
    the configuration alone shows it.

    Returns:
        The run's directory; None if there is none yet.

    Raises:
        RunDirectoryError: it is a file, holds other files, or holds a run with another configuration.
    """
    check_free(path)
    if not path.exists():
        return None
    directory = RunDirectory(path)
    directory.check_config(config)
    return directory


def check_free(path: Path) -> None:
    """Raise RunDirectoryError if a run's directory would be a file, holds other files, or begins with ``~``, which
    only a shell reads as the home folder."""
    if path.parts[:1] and path.parts[0].startswith("~"):
        raise RunDirectoryError(f"output: {path}: write the home folder in full ({path.expanduser()})")
    if path.exists() and not path.is_dir():
        raise RunDirectoryError(f"output: {path} is a file; it must be a directory")
    if path.exists():
        _refuse_other_files(path)


def _refuse_other_files(path: Path) -> None:
    if (path / "run.json").exists() or (path / LEARN).exists():
        return
    others = sorted(
        p.name for p in path.iterdir() if p.name not in (LOCK, MANIFEST) and not p.name.endswith(".partial")
    )
    if others:
        raise RunDirectoryError(
            f"output: {path} is no run but holds other files ({', '.join(others[:3])}); choose another directory"
        )


def current_stage(record: Mapping[str, Any], stage: int) -> int:
    """The stage whose weights a run holds after a stage: that stage, or the one that its user or its gate went back to.

    Args:
        record: run.json.
    """
    if (to := rolled_back(record, stage)) is not None:
        return to
    decisions = {decision["stage"]: decision for decision in record.get("gate", [])}
    return decisions[stage]["current"] if stage in decisions else stage


def rolled_back(record: Mapping[str, Any], stage: int) -> int | None:
    """The stage that the run's user went back to after a stage, which counts more than the gate; None: to none.

    Args:
        record: run.json.
    """
    targets = [rollback["to"] for rollback in record.get("rollbacks", []) if rollback["after"] == stage]
    return targets[-1] if targets else None


def learned_stages(record: Mapping[str, Any], stage: int) -> list[int]:
    """The stages that made the weights that a run holds after a stage, without those that were undone.

    Args:
        record: run.json.
    """
    current = current_stage(record, stage)
    return [*learned_stages(record, current - 1), current] if current else []


def keeps_rows(path: Path) -> bool:
    """Whether the rows of a run's tasks can be read again; not where it learned with ``--memory none``."""
    return not (path / LEARN).exists() or read_json(path / LEARN)["memory"]


def require_runs(paths: list[Path]) -> None:
    """Raise RunDirectoryError if one of the paths is not a run's directory, or has no results."""
    for path in paths:
        if not (path / "run.json").exists():
            raise RunDirectoryError(f"{path}: is no run's directory (it has no run.json)")
        if (path / "matrix.json").exists():
            continue
        record = read_json(path / "run.json")
        if "tasks" not in record:
            raise RunDirectoryError(
                f"{path}: is a run of the laboratory, which has losses (evaluations.jsonl) and no score matrix"
            )
        if record.get("finished") is not None:
            raise RunDirectoryError(f"{path}: matrix.json is missing; the command that made this run writes it again")
        raise RunDirectoryError(f"{path}: has no results yet (no matrix.json); let its run go on")


def slug(task: str) -> str:
    """A task's name as a file name, which a longer one is cut to; two names may have the same."""
    name = task.replace("/", "_").replace(os.sep, "_")
    content = name.encode()
    return name if len(content) <= LONGEST_NAME else f"{content[:200].decode(errors='ignore')}-{_digest(task)}"


def file_name(name: str, names: Sequence[str]) -> str:
    """The name of a file about one of several names, which no other of them has: of a/b and a_b, a_b and a_b-2."""
    taken: dict[str, str] = {}
    for one in [*names, name]:
        file = slug(one)
        while file in taken and taken[file] != one:
            file += "-2"
        taken[file] = one
        if one == name:
            return file
    raise AssertionError(name)


def _digest(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()[:8]


def _commit() -> str | None:
    """The commit of the checkout that holdfast runs from; None for an installed package."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
