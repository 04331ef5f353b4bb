"""Go back to an earlier stage of a run, or forward again to one that was undone; no stage is deleted."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

from holdfast.errors import ConfigError, RunDirectoryError
from holdfast.records.directory import RunDirectory, current_stage, open_directory, require_runs
from holdfast.records.read import FinishedRun, read_run
from holdfast.records.stages import complete_stages, is_settled, named
from holdfast.runner.matrix import Outline, write_matrix
from holdfast.system.manifest import check
from holdfast.system.progress import Progress


def rollback(run: Path | str, *, to: int, progress: Progress | None = None) -> dict[str, Any]:
    """Let a run hold the weights of another stage from now on, and write matrix.json and the page anew.

    Whatever follows starts from that stage: the next stage, with the methods' memories of that one, and ``export``,
    ``evaluate`` and ``serve``. The stages that are undone stay on disk, and a rollback to one of them takes it back. A
    stage that was begun and is not complete is dropped.

    Args:
        run: a run's directory.
        to: a complete stage, from 1; 0: the model before training.
        progress: shows what was done; None: on standard error.

    Returns:
        The content of matrix.json, whose row of the last stage belongs to the stage that the run holds.

    Raises:
        ConfigError: there is no such stage.
        RunDirectoryError: there is no run, another process uses it, the stage has no weights or damaged ones, or the
            last stage is not measured yet.
    """
    path, progress = Path(run), progress or Progress()
    require_runs([path])
    with open_directory(path) as directory:
        found = read_run(path)
        last = max(done := complete_stages(found))
        _check(found, done, to)
        held = current_stage(directory.record, last)
        if held != to:
            _drop_unfinished(directory, found, last)
            directory.go_back(last, to)
        matrix = write_matrix(Outline.recorded(found), directory)
        _write_page(path)
    progress.line(
        f"{path}: holds {named(found, to)} already"
        if held == to
        else f"{path}: holds {named(found, to)} now; it held {named(found, held)}"
    )
    return matrix


def _check(run: FinishedRun, done: list[int], to: int) -> None:
    """Raise where the run cannot hold a stage."""
    path, last = run.path, done[-1]
    if run.untrained:
        raise ConfigError(f"{path}: its method trains nothing, so there is no stage to go back to")
    if to not in done:
        raise ConfigError(
            f"--to: {to} is no complete stage of {path}; complete, with 0 for before training: "
            + ", ".join(map(str, done))
        )
    if not is_settled(run, last):
        raise RunDirectoryError(
            f"{path}: {named(run, last)} is not measured and judged yet; let the run go on until it is, then go back"
        )
    if not to:
        return
    weights = [run.folders[to] / name for name in ("model", "adapter") if (run.folders[to] / name).is_dir()]
    if not weights or not (run.folders[to] / "method").is_dir():
        lacks = "method" if weights else "model or adapter"
        raise RunDirectoryError(
            f"{run.folders[to]}: holds no weights to go back to (there is no folder {lacks}); restore it from a copy"
        )
    for folder in (*weights, run.folders[to] / "method"):
        check(folder)


def _drop_unfinished(directory: RunDirectory, run: FinishedRun, last: int) -> None:
    """Delete what a stage that is not complete has left, which began with the weights that the run held till now."""
    for number, folder in run.folders.items():
        if number > last:
            shutil.rmtree(folder)
    directory.trim_events(last, math.inf)


def _write_page(path: Path) -> None:
    from holdfast.report import write_report

    write_report([path], path / "report.html")
