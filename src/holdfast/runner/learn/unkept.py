"""The stream of a run that keeps no rows: the new task's are in memory only, those of the others are gone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from holdfast.api.task import Counts, Stream, Task
from holdfast.config.evaluation import EvaluationConfig
from holdfast.config.stream import DataConfig, TaskConfig
from holdfast.data.given import GivenRow, read_given
from holdfast.data.load import complete
from holdfast.data.source import scored
from holdfast.errors import DataError
from holdfast.records.kept import Kept


def unkept_stream(
    kept: Kept, recorded: Mapping[str, Any], data: DataConfig, evaluation: EvaluationConfig, source: TaskConfig | None
) -> Stream:
    """The tasks of a run, of which only the last has rows: those that its data hold.

    Args:
        recorded: what run.json says of each task.
        source: how the data of the last task are read; None: it is finished, and its rows are gone too.

    Raises:
        DataError: the data no longer hold all rows that were taken from them.
    """
    tasks = []
    for number, task in enumerate(kept.tasks, start=1):
        options = TaskConfig.model_validate(task["options"])
        last = number == len(kept.tasks) and source is not None
        tasks.append(_with_rows(kept, task, options, source, data) if last else _gone(task, options, recorded))  # type: ignore[arg-type]
    return complete(Stream("tasks", tasks), data, evaluation)


def _gone(task: Mapping[str, Any], options: TaskConfig, recorded: Mapping[str, Any]) -> Task:
    facts = recorded[options.name]
    made = Task(options.name, "", [], [], labels=options.labels, asked=options.format or "")
    made = scored(made, options)
    made.gone, made.fingerprint = (task["train"], task["test"]), facts["fingerprint"]
    made.counts = Counts(**{key: facts.get(key, 0) for key in asdict(Counts())})
    return made


def _with_rows(kept: Kept, task: Mapping[str, Any], options: TaskConfig, source: TaskConfig, data: DataConfig) -> Task:
    sides = kept.sides_of(task["name"])
    read = read_given(task["data"], source, data)
    tested = {row.id for split, part in read.rows.items() if split in ("test", "eval") for row in part}
    rows: dict[str, list[GivenRow]] = {"train": [], "test": []}
    for split, part in read.rows.items():
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
