"""Measure all tasks and general abilities of one model into a folder; results that are there are not measured again."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from holdfast.api.task import General, Task
from holdfast.evaluation.general import (
    choice_records,
    choices_chance,
    general_statistics,
    general_value,
    matrix_name,
    refusal_records,
)
from holdfast.evaluation.respond import evaluate_task
from holdfast.models.answers import AnswerCache
from holdfast.records.directory import RunDirectory, file_name
from holdfast.records.shapes import read_json, read_jsonl
from holdfast.records.thumbnails import keep_thumbnails
from holdfast.runner.due import Due
from holdfast.scoring.score import without_texts

if TYPE_CHECKING:
    from holdfast.evaluation.at_test import ModelEvaluation

Bar = Callable[[str], AbstractContextManager[Callable[[int, int], None]]]


def measure(
    directory: RunDirectory,
    folder: Path,
    of: Due,
    names: Sequence[str],
    *,
    evaluation: Callable[[AnswerCache], ModelEvaluation],
    longest: Callable[[Task], int | None],
    bar: Bar,
    when: str = "",
    texts: bool = True,
) -> None:
    """Write ``responses/TASK.jsonl`` for each task, ``responses/general/NAME.jsonl`` for each measure of refusals or
    choices, and ``evaluation.json``: the values of general abilities, the statistics of their examples, of choices the
    share that is right by chance and the name of the file of responses, and the seconds it took.

    What is there already is not measured again, such as all but the tasks that were appended since; the seconds add
    up.
    Tasks whose rows are gone are left out.
    Answers are saved in ``answers.jsonl`` until all of this is written. All ranks call this.

    Args:
        directory: writes the files.
        folder: holds them.
        of: what is measured.
        names: of all tasks that may be measured in this folder.
        evaluation: gives the model to be measured, which saves its answers in the cache; called only if something must
            be measured.
        longest: longest response to a task's examples, in tokens; None: it follows from the task's train answers.
        bar: shows a piece of the work under its title.
        when: a part of these titles.
        texts: keep what was asked and answered, not scores alone; if not, a kill loses the answers so far.
    """
    started = time.monotonic()
    answers = AnswerCache(folder / "answers.jsonl" if texts else None, writes=directory.process.main)
    directory.process.wait()
    for task in of.tasks:
        path = responses_file(folder, task.name, names)
        if task.gone is None and not directory.exists(path):
            with bar(f"evaluate {task.name} {when}".strip()) as on_batch:
                records = evaluate_task(evaluation(answers), task, max_new_tokens=longest(task), on_batch=on_batch)
            directory.write_jsonl(path, records if texts else without_texts(records))
            if texts:
                keep_thumbnails(directory, task.test)
    evaluated = read_evaluated(directory, folder)
    left = [one for one in of.general if matrix_name(one) not in evaluated["general"]]
    statistics, chosen = {}, dict[str, list[int]]()
    refusals = [one.name for one in of.general if one.kind == "refusals"]
    if scored := [one for one in left if one.kind != "refusals"]:
        with bar(f"evaluate general abilities {when}".strip()) as on_batch:
            statistics = general_statistics(evaluation(answers), scored, on_batch=on_batch, chosen=chosen)
    for one in left:
        if one.kind == "refusals":
            path = responses_file(folder / "responses", one.name, refusals, "general")
            if not directory.exists(path):
                with bar(f"ask {one.name} {when}".strip()) as on_batch:
                    records = refusal_records(evaluation(answers), one, on_batch=on_batch)
                directory.write_jsonl(path, records)
            statistics[matrix_name(one)] = np.array(
                [[record["score"], 1.0] for record in read_jsonl(path)], dtype=float
            )
    evaluated["general"] |= {name: general_value(name, examples) for name, examples in statistics.items()}
    if statistics:
        examples = {name: found.tolist() for name, found in statistics.items()}
        evaluated["general_examples"] = evaluated.get("general_examples", {}) | examples
    chance = {matrix_name(one): choices_chance(one) for one in left if one.kind == "choices"}
    if chance:
        evaluated["general_chance"] = evaluated.get("general_chance", {}) | chance
    if texts and chosen:
        evaluated["general_responses"] = evaluated.get("general_responses", {}) | _keep_choices(
            directory, folder / "responses", of.general, chosen
        )
    evaluated["seconds"] += time.monotonic() - started
    directory.write_json(folder / "evaluation.json", evaluated)
    answers.remove()


def _keep_choices(
    directory: RunDirectory, folder: Path, measures: Sequence[General], chosen: Mapping[str, Sequence[int]]
) -> dict[str, str]:
    """Write what was answered to each measure of choices; the name of the file, by that of the measure."""
    names = [one.name for kind in ("refusals", "choices") for one in measures if one.kind == kind]
    files = {}
    for one in measures:
        if (places := chosen.get(matrix_name(one))) is not None:
            path = responses_file(folder, one.name, names, "general")
            directory.write_jsonl(path, choice_records(one, places))
            files[matrix_name(one)] = path.name
    return files


def read_evaluated(directory: RunDirectory, folder: Path) -> dict[str, Any]:
    """evaluation.json, or one in which nothing is measured yet."""
    if directory.exists(folder / "evaluation.json"):
        return cast(dict[str, Any], read_json(folder / "evaluation.json"))
    return {"general": {}, "general_examples": {}, "seconds": 0.0}


def is_measured(directory: RunDirectory, folder: Path, of: Due, names: Sequence[str]) -> bool:
    """Whether :func:`measure` has nothing left to do in a folder; all ranks call this.

    Args:
        of: what is to be measured.
        names: of all tasks of the run.
    """
    measured = [task.name for task in of.tasks if task.gone is None]
    files = [folder / "evaluation.json", *(responses_file(folder, name, names) for name in measured)]
    if not all(directory.exists(file) for file in files):
        return False
    known = read_evaluated(directory, folder)["general"]
    return all(matrix_name(one) in known for one in of.general)


def responses_file(folder: Path, name: str, names: Sequence[str], kind: str = "responses") -> Path:
    """The file of the responses to a task or a measure of general ability, which is one of ``names``."""
    return folder / kind / f"{file_name(name, names)}.jsonl"
