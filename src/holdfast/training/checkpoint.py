"""A trainer's checkpoints on disk: which of them are complete, and their weights."""

from __future__ import annotations

import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any, NotRequired

from pydantic import with_config
from safetensors.torch import load_file
from torch import Tensor
from transformers import TrainerState
from typing_extensions import TypedDict

from holdfast.errors import ConfigError, RunDirectoryError
from holdfast.system.files import finite, flush_folder, json_file, read_json, refuse_link, write_json
from holdfast.system.manifest import compare, folder_facts, remedy, text_facts
from holdfast.system.shapes import AS_WRITTEN, Count, Facts, Number, of_shape

SCHEDULER_NAME = "scheduler.pt"
TRAINER_STATE = "trainer_state.json"
COMPLETE = "complete.json"
"""The last file of a checkpoint; a checkpoint without it was cut off while it was written."""


@with_config(AS_WRITTEN)
class _Cost(TypedDict):
    tokens: Count
    seconds: float
    peak_memory_gib: float


@with_config(AS_WRITTEN)
class _File(TypedDict):
    bytes: Count
    sha256: str


@with_config(AS_WRITTEN)
class _Complete(TypedDict):
    """complete.json; version 0.1.0 wrote neither stage and task nor checksums."""

    stage: NotRequired[Count]
    task: NotRequired[str]
    cost: _Cost
    files: NotRequired[dict[str, _File]]
    checksum: NotRequired[_File | None]


@with_config(AS_WRITTEN)
class _State(TypedDict):
    """trainer_state.json, as transformers' TrainerState is made from it."""

    epoch: NotRequired[float | None]
    global_step: Count
    max_steps: NotRequired[int]
    logging_steps: NotRequired[float | None]
    eval_steps: NotRequired[float | None]
    save_steps: NotRequired[float | None]
    train_batch_size: NotRequired[Count | None]
    num_train_epochs: NotRequired[float]
    num_input_tokens_seen: NotRequired[Count]
    total_flos: NotRequired[float]
    log_history: list[Facts]
    best_metric: NotRequired[Number]
    best_global_step: NotRequired[Count | None]
    best_model_checkpoint: NotRequired[str | None]
    trial_name: NotRequired[str | None]
    trial_params: NotRequired[Facts | None]
    stateful_callbacks: NotRequired[Facts | None]


def saved_weights(folder: Path) -> dict[str, Tensor]:
    """Load the weights that ``save_pretrained`` wrote, from one file or several."""
    return {name: t for path in sorted(folder.glob("model*.safetensors")) for name, t in load_file(path).items()}


def complete_checkpoint(folder: Path, facts: dict[str, Any]) -> None:
    """Write the last file of a checkpoint: facts, and the checksums of all other files and of itself."""
    flush_folder(folder)
    files = {name: known for name, known in folder_facts(folder).items() if name != COMPLETE}
    content = finite(facts | {"files": files})
    write_json(folder / COMPLETE, content | {"checksum": text_facts(json_file(content))})


def read_complete(folder: Path, files: bool = True) -> dict[str, Any]:
    """The facts of a checkpoint that :func:`complete_checkpoint` completed.

    Args:
        files: compare its files with their checksums, which checkpoints of version 0.1.0 do not have.

    Raises:
        RunDirectoryError: a file is missing or damaged; the message names it.
    """
    path = folder / COMPLETE
    try:
        content: dict[str, Any] = dict(of_shape(_Complete, read_json(path)))
    except ValueError:
        content = {"checksum": {}}
    checksum = content.pop("checksum", None)
    if checksum is not None and checksum != text_facts(json_file(content)):
        raise RunDirectoryError(
            f"{path}: is damaged; delete {folder}, and go on from an earlier checkpoint or the start"
        )
    if files:
        compare(path, folder, content.get("files", {}))
        for file in folder.glob("*.json") if "files" not in content else ():  # of version 0.1.0
            read_json(file)
        _check_state(folder)
    return content


def _check_state(folder: Path) -> None:
    """Check what Trainer goes on from, which it does not; RunDirectoryError if the file is damaged."""
    path = folder / TRAINER_STATE
    try:
        state = of_shape(_State, read_json(path))
        if unknown := state.keys() - {field.name for field in fields(TrainerState)}:
            raise ValueError(f"{min(unknown)}: is no field of a trainer's state")
        if _step(folder) not in (-1, state["global_step"]):  # -1: a user gave it another name
            raise ValueError(f"global_step: must be that of the folder's name, not {state['global_step']}")
    except RunDirectoryError:
        raise
    except ValueError as error:
        raise RunDirectoryError(f"{path}: is damaged: {error}; {remedy(path)}") from None


def checkpoint_to_resume(chosen: str | bool | None, folder: Path, stage: int, task: str) -> str | None:
    """The checkpoint that a stage resumes from: None, the one that is given, or for True the newest of this stage.

    Args:
        chosen: ``resume_from_checkpoint``.
        folder: the trainer's ``output_dir``.
        stage, task: the stage that the trainer is about to train. Checkpoints of version 0.1.0 do not know theirs.

    Raises:
        ConfigError: there is none, another trainer wrote it, or it is of another stage.
        RunDirectoryError: a file of it is damaged.
    """
    if not chosen:
        return None
    if chosen is not True:
        path = Path(str(chosen))
        if not (path / COMPLETE).exists():
            raise ConfigError(_foreign(path))
        if other := _other_stage(path, stage, task):
            raise ConfigError(
                f"resume_from_checkpoint: {path}: it is of {other}, but this trainer is about to train stage {stage} "
                f"({task!r}); give a checkpoint of this stage, or the trainer that stage (stage_index and task)"
            )
        read_complete(path)
        return str(path)
    there = sorted(folder.glob("checkpoint-*"), key=_step, reverse=True)
    complete = [path for path in there if (path / COMPLETE).exists()]
    others = {path: _other_stage(path, stage, task) for path in complete}
    own = [path for path, other in others.items() if not other]
    if own:
        read_complete(own[0])
        return str(own[0])
    if complete:
        raise ConfigError(
            f"resume_from_checkpoint: there is no checkpoint of stage {stage} ({task!r}) in {folder}; the newest, "
            f"{complete[0].name}, is of {others[complete[0]]}"
        )
    if there:
        raise ConfigError(_foreign(there[0]))
    raise ConfigError(
        f"resume_from_checkpoint: No valid checkpoint found in output directory ({folder}); leave it out to train from "
        "the start"
    )


def _foreign(path: Path) -> str:
    """It begins with Trainer's own words, as programs may look for them."""
    return (
        f"resume_from_checkpoint: Can't find a valid checkpoint at {path}: it has no {COMPLETE}, so another trainer "
        "wrote it, or it was cut off; "
        "one that a continual trainer has completed would do"
    )


def _other_stage(path: Path, stage: int, task: str) -> str:
    """The stage that a checkpoint is of, in words; empty if it is this one, or not known."""
    facts = read_complete(path, files=False)
    if (facts.get("stage", stage), facts.get("task", task)) == (stage, task):
        return ""
    return f"stage {facts['stage']} ({facts['task']!r})"


def _step(checkpoint: Path) -> int:
    number = checkpoint.name.rpartition("-")[2]
    return int(number) if number.isdigit() else -1


def newest_whole_checkpoint(folder: Path) -> Path | None:
    """Return the newest complete checkpoint below ``folder``, if there is one; remove those that were cut off."""
    complete = []
    refuse_link(folder)  # whose checkpoints are removed
    for path in folder.glob("checkpoint-*"):
        if (path / COMPLETE).exists():
            complete.append(path)
        else:
            shutil.rmtree(path)
    return max(complete, key=_step, default=None)
