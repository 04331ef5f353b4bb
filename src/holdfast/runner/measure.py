"""All tasks and general abilities of one model, measured into a folder; what stands there is not asked again."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from holdfast.api.task import General, Task
from holdfast.evaluation.general import general_statistics, general_value, matrix_name, refusal_records
from holdfast.evaluation.respond import evaluate_task
from holdfast.models.answers import AnswerCache
from holdfast.records.directory import RunDirectory, slug
from holdfast.system.files import read_jsonl

if TYPE_CHECKING:
    from holdfast.evaluation.at_test import ModelEvaluation

Bar = Callable[[str], AbstractContextManager[Callable[[int, int], None]]]


def measure(
    directory: RunDirectory,
    folder: Path,
    tasks: Sequence[Task],
    general: Sequence[General],
    *,
    evaluation: Callable[[AnswerCache], ModelEvaluation],
    limit: Callable[[Task], int | None],
    bar: Bar,
    when: str = "",
) -> None:
    """Write ``responses/TASK.jsonl`` of each task, ``responses/general/NAME.jsonl`` of each measure of refusals, and
    ``evaluation.json``: the values of general abilities, their examples' statistics, and the seconds that it took.

    Answers are kept in ``answers.jsonl`` until all of this is written. All processes call this.

    Args:
        directory: whose files they are.
        folder: in it.
        evaluation: the model to be measured, which keeps its answers there; called only if something is to be asked.
        limit: longest response to a task's examples, in tokens; None: what follows from its train answers.
        bar: shows a piece of the work under its title.
        when: a part of these titles.
    """
    started = time.monotonic()
    kept = AnswerCache(folder / "answers.jsonl", writes=directory.process.main)
    directory.process.wait()
    for task in tasks:
        path = responses_file(folder, task.name)
        if not directory.exists(path):
            with bar(f"evaluate {task.name} {when}".strip()) as on_batch:
                records = evaluate_task(evaluation(kept), task, max_new_tokens=limit(task), on_batch=on_batch)
            directory.write_jsonl(path, records)
    found = {}
    if scored := [one for one in general if one.kind != "refusals"]:
        with bar(f"evaluate general abilities {when}".strip()) as on_batch:
            found = general_statistics(evaluation(kept), scored, on_batch=on_batch)
    for one in general:
        if one.kind == "refusals":
            path = responses_file(folder / "responses", one.name, "general")
            if not directory.exists(path):
                with bar(f"ask {one.name} {when}".strip()) as on_batch:
                    records = refusal_records(evaluation(kept), one, on_batch=on_batch)
                directory.write_jsonl(path, records)
            found[matrix_name(one)] = np.array([[record["score"], 1.0] for record in read_jsonl(path)], dtype=float)
    evaluated = {
        "general": {name: general_value(name, statistics) for name, statistics in found.items()},
        "general_examples": {name: statistics.tolist() for name, statistics in found.items()},
        "seconds": time.monotonic() - started,
    }
    directory.write_json(folder / "evaluation.json", evaluated)
    kept.remove()


def responses_file(folder: Path, name: str, kind: str = "responses") -> Path:
    """Where the responses to a task, or a measure of general ability, are kept."""
    return folder / kind / f"{slug(name)}.jsonl"
