"""The summary figures of runs side by side: what each means, which direction is good, which run is best."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from holdfast.report.read import Run, read_runs, same_stream

Direction = Literal["high", "low"]


@dataclass(frozen=True)
class Figure:
    """One summary figure: its key in matrix.json, what it is, and which direction is good.

    ``signed``: it is a change, so it is written with its sign.
    """

    key: str
    label: str
    definition: str
    formula: str
    better: Direction
    signed: bool = False


FIGURES = (
    Figure(
        "average",
        "average",
        "Mean score of all tasks after the last stage.",
        "mean over j of S[T][j]",
        "high",
    ),
    Figure(
        "new_task",
        "new task",
        "Mean score of each task right after its own stage: how well new tasks are learned.",
        "mean over j of S[j][j]",
        "high",
    ),
    Figure(
        "forgetting",
        "forgetting",
        "How far each earlier task fell from its best to the end. Positive is worse.",
        "mean over j < T of (best S[t][j] for j ≤ t < T, less S[T][j])",
        "low",
    ),
    Figure(
        "backward_transfer",
        "backward transfer",
        "What later stages did to each earlier task since its own stage. Negative is worse.",
        "mean over j < T of (S[T][j] − S[j][j])",
        "high",
        signed=True,
    ),
    Figure(
        "forward_transfer",
        "forward transfer",
        "What earlier stages gave each task before its own stage, against no training. Positive is better.",
        "mean over j > 1 of (S[j−1][j] − S[0][j])",
        "high",
        signed=True,
    ),
    Figure(
        "general_change",
        "general change",
        "Change of general ability (its accuracy-like measures) from before training to the end. Negative is worse.",
        "mean over measures of (after the last stage − before training)",
        "high",
        signed=True,
    ),
)
MINUTES = Figure("minutes", "minutes", "Time to train and evaluate.", "", "low")


def compare_table(paths: list[Path]) -> list[dict[str, Any]]:
    """Give one row a run, for a table of any kind.

    A row holds ``run`` (its label), ``directory``, the six figures of matrix.json's summary and ``minutes`` (floats, or
    None where not measured), ``intervals`` ({figure: [low, high]}), ``reference`` (why the run competes with nobody, or
    None) and ``best`` (the keys for which it is the best; nobody is where all are the same or streams differ).

    Raises:
        RunDirectoryError: a directory holds no run, or none that was evaluated yet.
    """
    return rows_of(read_runs(paths))


def rows_of(runs: list[Run]) -> list[dict[str, Any]]:
    """The rows of `compare_table` for runs that are read already."""
    rows = [
        {
            "run": run.label,
            "directory": str(run.path),
            **{figure.key: run.matrix["summary"].get(figure.key) for figure in FIGURES},
            "minutes": run.minutes,
            "intervals": run.matrix["intervals"],
            "reference": run.reference,
            "best": [],
        }
        for run in runs
    ]
    contestants = [row for row in rows if row["reference"] is None]
    if len(contestants) < 2 or not same_stream(runs):
        return rows
    for figure in (*FIGURES, MINUTES):
        better = direction(figure, runs[0])
        values = [row[figure.key] for row in contestants if row[figure.key] is not None]
        if len(set(values)) > 1:
            top = max(values) if better == "high" else min(values)
            for row in contestants:
                if row[figure.key] == top:
                    row["best"].append(figure.key)
    return rows


def direction(figure: Figure, run: Run) -> Direction:
    """Which direction is good in this run: a mean loss is good when low.

    Differences are turned round for losses, so that their sign keeps its meaning.
    """
    return "low" if figure.key in ("average", "new_task") and run.lower_is_better(0) else figure.better
