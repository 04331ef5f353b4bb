"""A run's directory: who may use it, what is in it, and how far the run has come (DESIGN 4.2)."""

from __future__ import annotations

import contextlib
import datetime
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from holdfast.config.describe import difference
from holdfast.config.section import Section
from holdfast.engines.process import Process
from holdfast.errors import RunDirectoryError
from holdfast.system.files import LOCK, locked_folder, read_appended, read_json, whole_folder, write_json, write_jsonl
from holdfast.system.machine import hardware, versions


class RunDirectory:
    """The files of one run. Only :func:`open_directory` makes one, under a lock.

    All processes of a run have one; the main process alone writes, and they wait for each other after it has.
    """

    def __init__(self, path: Path):
        self.path = path
        self.process = Process.this()
        self.record: dict[str, Any] = read_json(path / "run.json") if (path / "run.json").exists() else {}

    def begin(self, config: Section, facts: dict[str, Any], data: str = "tasks") -> None:
        """Write run.json, or make sure that the one that stands there is of the same run.

        Args:
            config: of a run or a laboratory run.
            facts: what else run.json says; ``facts[data]`` has a ``fingerprint`` of each piece of data, by its name.

        Raises:
            RunDirectoryError: the directory belongs to another configuration or other data; the difference is listed.
        """
        world, values = self.process.world, config.model_dump(mode="json")
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
            } | facts
            self.write()
            return
        if "stream" in self.record and self.record["stream"] != facts["stream"]:
            old, new = self.record["stream"]["version"], facts["stream"]["version"]
            raise RunDirectoryError(
                f"{self.path}: the prompts or metrics of its stream changed since this run began (version {old} -> "
                f"{new}); give another output"
            )
        for name, piece in facts[data].items():
            if self.record[data][name]["fingerprint"] != piece["fingerprint"]:
                raise RunDirectoryError(
                    f"{self.path}: the data of {data.removesuffix('s')} {name!r} changed since this run began; "
                    "put the old data back, or give another output"
                )
        if self.record["config"] != values:  # in keys that change nothing that is done
            self.record["config"] = values
            self.write()

    def check_config(self, config: Section) -> None:
        """RunDirectoryError if a run with another configuration began here."""
        if self.record and (lines := difference(self.record["config"], config, type(config))):
            listed = "".join(f"\n  {line}" for line in lines)
            raise RunDirectoryError(
                f"{self.path}: holds a run with another configuration:{listed}\n"
                "give another output, or the old values to continue that run"
            )

    def finish(self, seconds: dict[str, float], **cost: float) -> None:
        """Note in run.json that the run is complete, how long it took, and what else it cost."""
        if self.record["finished"] is None:
            self.record |= {"finished": _now(), "seconds": seconds} | cost
            self.write()

    def way_to(self, model: str) -> str | None:
        """The way from here to a model's folder, which stays right where both are moved; None for a hub name."""
        return os.path.relpath(Path(model).absolute(), self.path.resolve()) if Path(model).is_dir() else None

    def write(self) -> None:
        self.write_json(self.path / "run.json", self.record)

    def exists(self, path: Path) -> bool:
        """Whether the main process finds a file, in all processes."""
        return self.process.broadcast(path.exists())

    def write_json(self, path: Path, value: Any) -> None:
        """Write a JSON file; all processes call this."""
        if self.process.main:
            write_json(path, value)
        self.process.wait()

    def write_jsonl(self, path: Path, rows: list[dict[str, Any]]) -> None:
        """Write a JSON-lines file; all processes call this."""
        if self.process.main:
            write_jsonl(path, rows)
        self.process.wait()

    @contextlib.contextmanager
    def whole_folder(self, path: Path) -> Iterator[Path]:
        """A temporary folder to fill, which becomes ``path``; all processes call this, and the main one writes."""
        if self.process.main:
            with whole_folder(path) as partial:
                yield partial
        else:
            with tempfile.TemporaryDirectory() as scratch:  # libraries make, and list, the folder that they are given
                yield Path(scratch)
        self.process.wait()

    def stage(self, index: int, name: str) -> Path:
        """The folder of a stage; index 0 is before training."""
        return self.path / "stages" / f"{index:02d}-{slug(name)}"

    def trim_events(self, stage: int, step: int) -> None:
        """Drop the events and curves after a step of a stage: a resumed run writes them again."""
        for name in ("events.jsonl", "curves.jsonl"):
            path = self.path / name
            if path.exists() and self.process.main:
                lines = [line for line in read_appended(path) if (line["stage"], line["step"]) <= (stage, step)]
                write_jsonl(path, lines)
        self.process.wait()


@contextlib.contextmanager
def open_directory(path: Path) -> Iterator[RunDirectory]:
    """Make the directory if it is new and hold its lock.

    Raises:
        RunDirectoryError: it is a file, cannot be written, holds something else, or another process uses it; or what
            is done in it fills the disk.
    """
    process = Process.this()
    if not process.main:
        process.wait()
        yield RunDirectory(path)
        return
    with locked_folder(path):
        if not (path / "run.json").exists():
            others = sorted(p.name for p in path.iterdir() if p.name != LOCK and not p.name.endswith(".partial"))
            if others:
                raise RunDirectoryError(
                    f"output: {path} is no run but holds other files ({', '.join(others[:3])}); choose another output"
                )
        process.wait()
        yield RunDirectory(path)


def current_stage(record: dict[str, Any], stage: int) -> int:
    """The stage whose weights a run holds after a stage: itself, or an earlier one to which the gate went back.

    Args:
        record: run.json.
    """
    decisions = {decision["stage"]: decision for decision in record.get("gate", [])}
    return decisions[stage]["current"] if stage in decisions else stage


def learned_stages(record: dict[str, Any], stage: int) -> list[int]:
    """The stages that made the weights that a run holds after a stage: all up to it, without those that the gate undid.

    Args:
        record: run.json.
    """
    held = current_stage(record, stage)
    return [*learned_stages(record, held - 1), held] if held else []


def require_runs(paths: list[Path]) -> None:
    """RunDirectoryError if one of the paths is no run's directory with results."""
    for path in paths:
        if not (path / "run.json").exists():
            raise RunDirectoryError(f"{path}: is no run's directory (it has no run.json)")
        if not (path / "matrix.json").exists():
            raise RunDirectoryError(f"{path}: has no results yet (no matrix.json); let its run go on")


def slug(task: str) -> str:
    """A task's name as a file name."""
    return task.replace("/", "_").replace(os.sep, "_")


def _commit() -> str | None:
    """The commit of the checkout that holdfast runs from; None for an installed package."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
