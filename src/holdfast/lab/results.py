"""Collect an experiment's results from its folders into tables."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from holdfast.lab.derived import above_front, compute_multiplier, loss_at_matched
from holdfast.lab.experiment import DONE, Experiment, PlannedLabRun
from holdfast.lab.pretrain import evaluations
from holdfast.lab.shapes import Matrix, Measured, Result
from holdfast.lab.tables import TableRow
from holdfast.records.shapes import checked
from holdfast.system.manifest import read_json


def tables(experiment: Experiment, runs: Sequence[PlannedLabRun], cache: Path) -> tuple[list[TableRow], list[TableRow]]:
    """Make a row for each run that is done and, where the experiment asks for curves, one for each of its evaluations.

    Columns of each domain, in nats per token: ``DOMAIN_start``, ``DOMAIN_loss`` (at the end) and ``DOMAIN_kl``. Columns
    of a run that goes on from another: ``forgetting``, the rise of the old domain's loss; ``learned``, the fall of the
    new domain's; ``forgetting_matched``, that rise where the new domain's loss reaches ``matched``;
    ``compute_multiplier``, over the evaluations of the run that it goes on from; ``above_front``, its height above the
    front of its seed.
    """
    results: list[TableRow] = []
    curves: list[TableRow] = []
    for run in runs:
        folder = run.folder(cache)
        columns = {"group": run.group, **run.columns, "seed": run.seed, "run": run.key}
        if run.command == "run":
            results.append(
                columns | score_columns(_read(folder / "matrix.json", Matrix)) | _read(folder / DONE, Measured)
            )
            continue
        result, measured = _read(folder / "result.json", Result), evaluations(folder)
        losses = _losses(measured)
        row = columns | {key: result[key] for key in ("parameters", "tokens", "seconds", "stop")}
        for name, values in losses.items():
            kl = measured[-1]["domains"][name]["kl"]
            row |= {f"{name}_start": values[0], f"{name}_loss": values[-1], f"{name}_kl": kl}
        if run.parent is not None and experiment.old in losses and experiment.new in losses:
            before = evaluations(run.parent.folder(cache))
            row |= _changes(experiment, losses[experiment.old], losses[experiment.new], before)
        results.append(row | _read(folder / DONE, Measured))
        for i, evaluation in enumerate(measured if experiment.curves else []):
            at = {key: evaluation[key] for key in ("step", "tokens", "seconds")}
            curves.append(columns | at | {f"{name}_loss": values[i] for name, values in losses.items()})
    if experiment.front is not None:
        _measure_over_front(results, experiment.front, f"{experiment.new}_loss", f"{experiment.old}_loss")
    return results, curves


def _read(path: Path, shape: Any) -> Any:
    return checked(path, shape, read_json(path))


def _losses(evaluations: list[dict[str, Any]]) -> dict[str, list[float]]:
    """The loss of each domain at each evaluation."""
    return {name: [_number(e["domains"][name]["loss"]) for e in evaluations] for name in evaluations[0]["domains"]}


def _number(value: float | None) -> float:
    """NaN where a value was not finite."""
    return math.nan if value is None else value


def _changes(experiment: Experiment, old: list[float], new: list[float], before: list[dict[str, Any]]) -> TableRow:
    row: TableRow = {"forgetting": old[-1] - old[0], "learned": new[0] - new[-1]}
    if experiment.matched is not None:
        matched = loss_at_matched(new, old, experiment.matched)
        row["forgetting_matched"] = None if matched is None else matched - old[0]
    pretraining = _losses(before)
    if experiment.old in pretraining:
        tokens = [evaluation["tokens"] for evaluation in before]
        row["compute_multiplier"] = compute_multiplier(tokens, pretraining[experiment.old], old[-1])
    return row


def _measure_over_front(results: list[TableRow], group: str, new: str, old: str) -> None:
    for row in results:
        front = [(at[new], at[old]) for at in results if at["group"] == group and at["seed"] == row["seed"]]
        if row["group"] != group and len(front) > 1:
            row["above_front"] = above_front(front, (row[new], row[old]))


def score_columns(matrix: dict[str, Any]) -> TableRow:
    """Columns of a run of one stage: scores before and after, ``NAME_start`` and ``NAME`` (``NAME_loss`` for losses).

    ``choices_start`` and ``choices`` are means over all multiple choice; ``choices_lost`` is their difference.
    """
    columns: TableRow = {}
    for name, start, end in zip(matrix["tasks"], *matrix["scores"], strict=True):
        columns |= {f"{name}_start": start, f"{name}_loss" if matrix["metrics"][name] == "loss" else name: end}
    shares = []
    for name, (start, end) in matrix["general"].items():
        measure = name.removeprefix("perplexity/")
        if measure != name:
            columns |= {f"{measure}_start": math.log(_number(start)), f"{measure}_loss": math.log(_number(end))}
        else:
            columns |= {f"{measure}_start": start, measure: end}
            shares.append((start, end))
    if shares:
        start, end = (sum(values) / len(shares) for values in zip(*shares, strict=True))
        columns |= {"choices_start": start, "choices": end, "choices_lost": start - end}
    return columns
