"""A large task as it was read, in a file of ``data.cache``: found again while its files and settings are the same."""

from __future__ import annotations

import json
import os
from dataclasses import fields
from pathlib import Path
from typing import Any

from holdfast.api.task import Task
from holdfast.config.evaluation import EvaluationConfig
from holdfast.config.stream import DataConfig
from holdfast.data.cache_file import DIGEST, code, complete, is_whole, partial_file
from holdfast.data.on_disk import OnDisk
from holdfast.data.source import Source, source_files
from holdfast.data.survey import Survey
from holdfast.system.files import json_text
from holdfast.system.manifest import file_facts

SPLITS = ("train", "eval", "test")
OF_DATA = ("on_overlap", "on_bad_row", "reasoning", "hold_out", "train_rows", "test_rows")
"""Keys of ``data`` that a task depends on, as it is read."""
MADE = ("fingerprint", "counts", "gone")
"""Fields of a task that are known when all tasks are."""
NUMBER = 8
"""Bytes of the number that says where the facts begin."""


class TaskFile:
    """The file of a task in the user's folder, whose name tells what it was read from and how.

    Args:
        folder: ``data.cache``.

    Raises:
        UserError: a file of the task cannot be found.
    """

    def __init__(self, folder: Path, source: Source, data: DataConfig, evaluation: EvaluationConfig):
        known = [
            code(),
            source.name,
            source.options.model_dump(mode="json"),
            str(source.folder),
            source.instruction,
            str(source.instructions),
            data.model_dump(include=set(OF_DATA), mode="json"),
            [evaluation.split, evaluation.rows],
            [(name, str(file), file_facts(file)) for name, files in source_files(source).items() for file in files],
        ]
        self.path = folder / f"{DIGEST(json_text(known).encode()).hexdigest()}.task"

    def read(self) -> tuple[Task, str] | None:
        """The task as :func:`.load_task` gave it, and its fingerprint; None if there is no whole file of that name."""
        try:
            return self._read() if is_whole(self.path) else None
        except (OSError, ValueError, LookupError, TypeError):  # a file of an earlier version, say
            return None

    def _read(self) -> tuple[Task, str]:
        file = self.path.open("rb")  # the examples read from it
        end = os.fstat(file.fileno()).st_size - DIGEST().digest_size
        begin = int.from_bytes(os.pread(file.fileno(), NUMBER, end - NUMBER), "little")
        facts = json.loads(os.pread(file.fileno(), end - NUMBER - begin, begin))
        prompts = os.pread(file.fileno(), facts["prompts"][1], facts["prompts"][0])
        survey = Survey.found(prompts, facts["different"])
        train, eval_, test = (
            OnDisk.found(file, facts["splits"][name], facts["places"][name], survey if name == "train" else Survey())
            for name in SPLITS
        )
        task = Task(**facts["task"], train=train, test=list(test), eval=eval_ if facts["large_eval"] else list(eval_))
        return task, facts["fingerprint"]

    def write(self, task: Task, fingerprint: str) -> None:
        """Write a task whose train split lies on disk.

        Nothing is written of a task with pictures.

        Raises:
            DataError: the folder cannot be written to, or its disk is full.
        """
        splits = {name: getattr(task, name) for name in SPLITS}
        on_disk = {name: split if isinstance(split, OnDisk) else OnDisk(split) for name, split in splits.items()}
        if any(split.in_memory for split in on_disk.values()):
            return
        survey = on_disk["train"].survey
        facts: dict[str, Any] = {
            "task": {f.name: getattr(task, f.name) for f in fields(Task) if f.name not in (*SPLITS, *MADE)},
            "splits": {name: split.facts() for name, split in on_disk.items()},
            "places": {name: {} for name in SPLITS},
            "different": survey.different,
            "large_eval": isinstance(task.eval, OnDisk),
            "fingerprint": fingerprint,
        }
        with partial_file(self.path) as partial:
            with partial.open("wb") as file:
                for name, split in on_disk.items():
                    for what, content in split.contents().items():
                        begin = file.tell()
                        file.writelines(content)
                        facts["places"][name][what] = (begin, file.tell() - begin)
                facts["prompts"] = (file.tell(), file.write(survey.prompts.tobytes()))
                begin = file.tell()
                file.write(json_text(facts).encode())
                file.write(begin.to_bytes(NUMBER, "little"))
            complete(partial)
            partial.replace(self.path)


def task_file(source: Source, data: DataConfig, evaluation: EvaluationConfig) -> TaskFile | None:
    """The file of a task; None if none is to be kept, or the task depends on more than its files and settings."""
    if data.cache is None or source.options.kind != "sft" or source.made or source.dataset or source.test_rows:
        return None
    try:
        return TaskFile(Path(data.cache), source, data, evaluation)
    except OSError:  # a file cannot be read, as will be said
        return None
