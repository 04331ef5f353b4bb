"""Which stages of a run are complete, and which of them nothing will undo soon."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from holdfast.errors import ConfigError, RunDirectoryError
from holdfast.records.directory import current_stage, rolled_back
from holdfast.records.read import FinishedRun


def complete_stages(run: FinishedRun) -> list[int]:
    """The numbers of the start and of the stages that are trained, in order.

    Raises:
        RunDirectoryError: one before another is missing, or all are.
    """
    require_folders(run)
    done = sorted(n for n, folder in run.folders.items() if n and (folder / "stage.json").exists())
    for number, there in enumerate(done, start=1):
        if number != there:
            raise RunDirectoryError(
                f"{run.path / 'stages'}: stage {number} is missing, though stage {there} is there; restore its folder "
                "from a copy"
            )
    return [0, *done]


def require_folders(run: FinishedRun) -> None:
    """Raise RunDirectoryError if the stages' folders are gone: even before training a run has one."""
    if not run.folders:
        raise RunDirectoryError(
            f"{run.path / 'stages'}: is missing or empty; it held the weights of the stages and what was measured; "
            f"restore it from a copy (without it, holdfast report {run.path} shows the scores alone)"
        )


def stage_number(run: FinishedRun, number: int | None = None) -> int:
    """The number of a complete stage.

    Args:
        number: from 1, or 0 for the model before training; None: the stage whose weights the run holds.

    Raises:
        RunDirectoryError: the stages' folders are gone.
        ConfigError: there is no such stage.
    """
    require_folders(run)
    complete = [n for n, folder in run.folders.items() if n == 0 or (folder / "stage.json").exists()]
    if number is None:
        number = current_stage(run.info, max(complete))
    if number not in complete:
        raise ConfigError(
            f"--stage: {number} is no complete stage of {run.path}; complete, with 0 for before training: "
            + ", ".join(map(str, complete))
        )
    return number


def is_settled(run: FinishedRun, stage: int) -> bool:
    """Whether a complete stage is measured and, where the run has a gate, judged."""
    judged = [decision["stage"] for decision in run.info.get("gate", [])]
    waits = stage and run.config.get("gate") and stage not in judged and rolled_back(run.info, stage) is None
    waits = waits and not is_older_than_the_gate(run.info, stage)
    return not waits and stage in run.folders and (run.folders[stage] / "evaluation.json").exists()


def is_older_than_the_gate(record: Mapping[str, Any], stage: int) -> bool:
    """Whether a stage began without a gate, and others follow, which a gate that the run has by now is for.

    Args:
        record: run.json.
    """
    gates = [entry["config"].get("gate") for entry in record.get("stages", []) if entry["stage"] == stage]
    return gates == [None] and record["config"].get("keep") is None and stage < len(record["tasks"])


def settled_stage(run: FinishedRun) -> int:
    """The stage that a run holds after the last one that is settled; 0 before there is any."""
    return current_stage(run.info, max((t for t in complete_stages(run) if is_settled(run, t)), default=0))


def named(run: FinishedRun, stage: int) -> str:
    """A stage in words: its number and its task."""
    return f"stage {stage} ({run.folders[stage].name.partition('-')[2]})" if stage else "the model before training"
