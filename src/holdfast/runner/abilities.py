"""The general abilities of a model as it is, before a run: what is asked, and what it answers."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from holdfast.api.task import General
from holdfast.evaluation.at_test import ModelEvaluation
from holdfast.evaluation.general import (
    choices_chance,
    general_statistics,
    general_value,
    matrix_name,
    refusal_records,
)
from holdfast.metrics.chance import against_chance
from holdfast.report.text import interval, number
from holdfast.runner.load import load_model
from holdfast.runner.setup import Setup
from holdfast.system.progress import Bar, Progress

MORE = "another form of its questions may show more (docs/general.md)"


def print_asked(measures: list[General], console: Console) -> None:
    """What each measure asks, and what is right by chance."""
    for measure in measures:
        what: str = measure.kind
        if measure.kind == "choices":
            what = f"{len(measure.questions)} questions by {measure.by}, chance {number(choices_chance(measure))}"
            if pictures := {picture.number for shown in measure.pictures for picture in shown}:
                what += f", {len(pictures)} pictures"
        elif count := len(measure.texts) + len(measure.rows):
            what += f", {count} {'prompts' if measure.kind == 'refusals' else 'texts'}"
        console.print(f"{measure.name}: {what}", markup=False, soft_wrap=True)
    console.print("--general measures them of the model as it is now", soft_wrap=True)


def print_general(setup: Setup, console: Console, progress: Progress) -> None:
    """Measure the general abilities of the model before its first stage, and print the value of each; of choices with
    its 95 % interval over the questions, what is right by chance, and whether the value is above that."""
    evaluation = ModelEvaluation(
        model=load_model(setup),
        encoder=setup.encoder,
        methods=setup.applied,
        batch_size=setup.config.evaluation.batch_size,
        seed=setup.config.seed,
        scorers=setup.scorers,
    )
    for measure in setup.general:
        name = matrix_name(measure)
        with progress.bar(f"measure {name}") as bar:
            statistics = _statistics(evaluation, measure, bar)
        line = f"{name}: {number(general_value(name, statistics))}"
        if measure.kind == "choices":
            found = against_chance(int(statistics[:, 0].sum()), len(statistics), choices_chance(measure))
            line += f" (95 % interval {interval(found['interval'])}) of {found['questions']} questions, "
            line += f"chance {number(found['level'])}: "
            line += f"at chance, so a fall cannot show; {MORE}" if found["at_chance"] else "above chance"
        console.print(line, markup=False, soft_wrap=True)


def _statistics(evaluation: ModelEvaluation, measure: General, bar: Bar) -> NDArray[np.float64]:
    """[examples, 2], as of :func:`~holdfast.evaluation.general.general_statistics`; of each prompt 1 or 0 for a refusal
    or another response, and 1."""

    def on_batch(done: int, total: int) -> None:
        bar.update(done, total=total)

    if measure.kind == "refusals":
        return np.array([[one["score"], 1.0] for one in refusal_records(evaluation, measure, on_batch=on_batch)])
    return general_statistics(evaluation, [measure], on_batch=on_batch)[matrix_name(measure)]
