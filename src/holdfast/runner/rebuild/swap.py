"""Put a rebuilt run in the place of the run that it was made from; a kill at any point loses neither."""

from __future__ import annotations

import shutil
from pathlib import Path

from holdfast.records.directory import REBUILD
from holdfast.system.files import LOCK

STATE = "rebuild.json"
"""What a sibling is to become; it is gone once that is done."""

MADE = {
    "run.json",
    "matrix.json",
    "events.jsonl",
    "curves.jsonl",
    "trackers.json",
    "tensorboard",
    "manifest.jsonl",
    "report.html",
    "stages",
    "rehearsal",
    "evaluations",
    "served",
    "learn.json",
    STATE,
    LOCK,
}
"""What holdfast makes in a run's directory and a rebuilding makes again. All else is carried over."""

LEARNED = {"data", "general", "pictures"}
"""The same of a run that learns what it is given."""


def sibling(path: Path) -> Path:
    """Where a run is made again: beside it, so that relative paths lead to the same places."""
    return path.with_name(path.name + REBUILD)


def former(path: Path) -> Path:
    """Where the old run lies for the moment between two names."""
    return path.with_name(f"{path.name}.former")


def exchange(path: Path) -> None:
    """Let the finished sibling take the run's place, carry over what is not holdfast's, and delete the old run.

    Called again after a kill, it goes on.
    """
    made, old = sibling(path), former(path)
    if not old.exists():
        path.rename(old)
    if not path.exists():
        (made / STATE).unlink(missing_ok=True)
        made.rename(path)
    own = MADE | (LEARNED if (old / "learn.json").exists() else set())
    for entry in old.iterdir():
        if entry.name not in own and not entry.name.endswith(".partial") and not (path / entry.name).exists():
            entry.rename(path / entry.name)
    shutil.rmtree(old)


def recover(path: Path) -> bool:
    """Finish an exchange that was killed; whether there was one."""
    if not former(path).exists():
        return False
    exchange(path)
    return True
