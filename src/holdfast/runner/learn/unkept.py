"""The stream of a run that keeps no rows: the new task's are in memory only, those of the others are gone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from holdfast.api.task import Counts, Stream, Task
from holdfast.config.evaluation import EvaluationConfig
from holdfast.config.stream import DataConfig, TaskConfig
from holdfast.data.given import Given, GivenRow
from holdfast.data.load import complete
from holdfast.data.source import scored
from holdfast.errors import DataError
from holdfast.records.kept import Kept


def unkept_stream(
    kept: Kept, recorded: Mapping[str, Any], data: DataConfig, evaluation: EvaluationConfig, given: Given
) -> Stream:
    """The tasks of a run, of which only the last has rows: those that its data hold.

    Args:
        recorded: what run.json says of each task.
        given: the data of the last task.

    Raises:
        DataError: the data no longer hold all rows that were taken from them.
    """
    *gone, last = ((task, TaskConfig.model_validate(task["options"])) for task in kept.tasks)
    tasks = [_gone(task, options, recorded) for task, options in gone]
    return complete(Stream("tasks", [*tasks, _with_rows(kept, *last, given)]), data, evaluation)


def _gone(task: Mapping[str, Any], options: TaskConfig, recorded: Mapping[str, Any]) -> Task:
    facts = recorded[options.name]
    made = Task(options.name, "", [], [], labels=options.labels, asked=options.format or "")
    made = scored(made, options)
    made.gone, made.fingerprint = (task["train"], task["test"]), facts["fingerprint"]
    made.counts = Counts(**{key: facts.get(key, 0) for key in asdict(Counts())})
    return made


def _with_rows(kept: Kept, task: Mapping[str, Any], options: TaskConfig, given: Given) -> Task:
    sides = kept.sides_of(task["name"])
    tested = {row.id for split, part in given.rows.items() if split in ("test", "eval") for row in part}
    rows: dict[str, list[GivenRow]] = {"train": [], "test": []}
    for split, part in given.rows.items():
        own = split in ("test", "eval")
        for row in part:
            side = sides.get(row.id)
            if side is not None and (side == "train" or own or row.id not in tested):
                rows[side].append(row)
    train, test = ([row.example for row in rows[side]] for side in ("train", "test"))
    if (len(train), len(test)) != (task["train"], task["test"]):
        raise DataError(
            f"{task['data']}: holds {len(train)} rows to train and {len(test)} to test of {options.name!r}, not the "
            f"{task['train']} and {task['test']} that its stage began with; put the old data back"
        )
    return scored(Task(options.name, "", train, test, labels=options.labels, asked=options.format or ""), options)
