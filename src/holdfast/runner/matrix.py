"""matrix.json and the curves, from the answers of all stages."""

from __future__ import annotations

from typing import Any, cast

from holdfast.evaluation.general import matrix_name
from holdfast.metrics.intervals import intervals
from holdfast.metrics.summary import area_under_curve, by_task, clipped_backward_transfer, summarize
from holdfast.records.directory import RunDirectory, current_stage, slug
from holdfast.runner.plan import START
from holdfast.runner.setup import Setup
from holdfast.scoring.score import beside_score, task_score
from holdfast.system.files import finite, read_appended, read_json, read_jsonl


def read_matrix(setup: Setup, directory: RunDirectory) -> dict[str, Any]:
    """Build what matrix.json holds (DESIGN 4.3) from the responses in the stages' folders."""
    tasks = setup.stream.tasks
    rows: list[list[Any]] = [[None] * len(tasks) for _ in range(len(tasks) + 1)]
    general: dict[str, list[float | None]] = {matrix_name(g): [None] * (len(tasks) + 1) for g in setup.general}
    stages = [START, *setup.stages]
    for stage in stages:
        held = stages[current_stage(directory.record, stage.index)]
        folder = directory.stage(held.index, held.name)
        for j, task in enumerate(tasks):
            path = folder / "responses" / f"{slug(task.name)}.jsonl"
            if path.exists():
                rows[stage.row][j] = read_jsonl(path)
        if (folder / "evaluation.json").exists():
            for name, value in read_json(folder / "evaluation.json")["general"].items():
                general[name][stage.row] = value
    if not setup.stages:  # nothing is trained, so every row is the first one
        rows = [rows[0]] * len(rows)
        general = {name: values[:1] * len(rows) for name, values in general.items()}
    metrics = {task.name: task.metric for task in tasks}
    scores = [
        [
            None if records is None else task_score(records, task.metric)
            for task, records in zip(tasks, row, strict=True)
        ]
        for row in rows
    ]
    columns = {
        task.name: {name: [row[j] and beside_score(row[j], name) for row in rows] for name in task.beside}
        for j, task in enumerate(tasks)
    }
    scorers = [setup.scorers[task.metric] for task in tasks]
    samples = [
        [None if r is None else scorer.statistics(r) for scorer, r in zip(scorers, row, strict=True)] for row in rows
    ]
    totals = [scorer.total for scorer in scorers]
    resamples = setup.config.evaluation.bootstrap
    matrix = {
        "tasks": [task.name for task in tasks],
        "metrics": metrics,
        "scores": scores,
        "beside": {task: values for task, values in columns.items() if values},
        "floors": {task.name: scores[0][j] for j, task in enumerate(tasks) if setup.scorers[task.metric].floor},
        "general": general,
        "joint": scores[-1] if setup.methods[0].schedule == "joint" else None,
        "summary": summarize(scores, metrics=scorers, general=general),
        "clipped_backward_transfer": clipped_backward_transfer(scores, metrics=scorers),
        "by_task": by_task(scores, metrics=scorers),
        "curves": read_curves(setup, directory, scores),
        "intervals": intervals(samples, metrics=scorers, totals=totals, resamples=resamples) if resamples else {},
    }
    return cast(dict[str, Any], finite(matrix))


def read_curves(setup: Setup, directory: RunDirectory, scores: list[list[Any]]) -> dict[str, Any]:
    """The learning curve of each task that was evaluated while its stage trained: steps, scores and the area under it.

    A curve begins with the model that the stage began with and ends with the one that it made.
    """
    path = directory.path / "curves.jsonl"
    measured = [line for line in read_appended(path) if "scores" in line]
    names = [task.name for task in setup.stream.tasks]
    curves = {}
    for stage in setup.stages:
        folder = directory.stage(stage.index, stage.name)
        lines = [line for line in measured if line["stage"] == stage.index]
        if not lines or not (folder / "evaluation.json").exists():
            continue
        last = read_json(folder / "stage.json")["steps"]
        for task in stage.tasks:
            before = scores[stage.index - 1][names.index(task.name)]
            after = task_score(read_jsonl(folder / "responses" / f"{slug(task.name)}.jsonl"), task.metric)
            between = [(line["step"], line["scores"][task.name]) for line in lines if line["step"] < last]
            points = [(0, before), *between, (last, after)]
            steps, values = [list(column) for column in zip(*points, strict=True)]
            curves[task.name] = {"steps": steps, "scores": values, "area": area_under_curve(steps, values)}
    return curves
