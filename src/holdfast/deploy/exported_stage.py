"""Which stage of a run is exported; told without the libraries that take seconds."""

from __future__ import annotations

from pathlib import Path

from holdfast import methods
from holdfast.errors import ConfigError, RunDirectoryError
from holdfast.records.directory import current_stage
from holdfast.records.read import FinishedRun
from holdfast.records.shapes import read_json
from holdfast.records.stages import require_folders


def find_exported_stage(run: FinishedRun, number: int | None) -> tuple[int, Path]:
    """Number and folder of a complete stage.

    Args:
        number: from 1; None: the last complete one, or the one that the run went back to.

    Raises:
        RunDirectoryError: no stage is complete, or the stages' folders are gone.
        ConfigError: there is no such stage, or it is before training.
    """
    require_folders(run)
    done = {read_json(file)["stage"]: file.parent for file in run.path.glob("stages/*/stage.json")}
    if not done:
        name = run.config["method"][0]["name"]
        untrained = methods.known()[name].schedule == "none" if name in methods.known() else False
        raise RunDirectoryError(
            f"{run.path}: method {name!r} trains nothing, so there is nothing to export but its base model"
            if untrained
            else f"{run.path}: no stage of this run is complete yet; let it go on"
        )
    if number is None:
        number = current_stage(run.info, max(done))
    if number not in done:
        complete = ", ".join(str(n) for n in sorted(done))
        why = "is before training, the base model itself" if number == 0 else "is no complete stage of this run"
        raise ConfigError(f"--stage: {number} {why}; complete: {complete}")
    return number, done[number]
