"""Published figures beside ours: a CSV file of what a paper reports, and the runs that its rows are about."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from holdfast.errors import DataError, did_you_mean
from holdfast.records.read import FinishedRun, settings
from holdfast.report.compare import Group, grouped

OWN = ("figure", "value", "unit", "source")
"""Columns of the file; any other one is a key of a run's configuration, or ``method``."""

UNITS = {"": 1.0, "%": 100.0}
"""Of a value, and how many of it 1 is."""


def mean_drop(run: FinishedRun) -> float | None:
    """mean over all T tasks of S[j][j] − S[T][j]: what TreeLoRA prints as BWT; positive is worse."""
    transfer, T = run.matrix["summary"]["backward_transfer"], len(run.tasks)
    return None if transfer is None else -transfer * (T - 1) / T


def train_seconds(run: FinishedRun) -> float | None:
    """Seconds of training."""
    return (run.info.get("seconds") or {}).get("train")


FIGURES: dict[str, Callable[[FinishedRun], float | None]] = {"mean_drop": mean_drop, "train_seconds": train_seconds}
"""Figures of papers that matrix.json has not."""


@dataclass(frozen=True)
class Published:
    """One figure of a paper.

    Attributes:
        where: which runs it is about: ``method``, or a dotted key of their configuration, with its value.
        figure: a key of matrix.json's summary, one of :data:`FIGURES`, ``score/TASK`` (of the last stage) or
            ``general/NAME`` (after it).
        value: as it is printed.
        unit: empty for fractions and seconds, or %.
        source: paper and table.
    """

    where: dict[str, str]
    figure: str
    value: float
    unit: str
    source: str

    def is_about(self, run: FinishedRun) -> bool:
        """Whether a run is one of those that the figure is about."""
        known = settings(run)
        return all(_same(value, run.method if key == "method" else known.get(key)) for key, value in self.where.items())

    def of(self, run: FinishedRun) -> float | None:
        """The same figure of a run, in the same unit; None where it was not measured."""
        kind, _, name = self.figure.partition("/")
        value: float | None
        if kind == "score":
            value = run.scores[-1][run.tasks.index(name)] if name in run.tasks else None
        elif kind == "general":
            value = (run.matrix["general"].get(name) or [None])[-1]
        elif self.figure in FIGURES:
            value = FIGURES[self.figure](run)
        else:
            value = run.figure(self.figure)
        return None if value is None else value * UNITS[self.unit]


def read_published(path: Path) -> list[Published]:
    """Read a CSV file with the columns figure, value, unit and source, and one a key that says what it is about.

    An empty cell of such a column says nothing.

    Raises:
        DataError: the file is absent or lacks a column; a value is no number; a unit is unknown.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    found = []
    for number, row in enumerate(rows, start=2):
        place = f"{path}: line {number}"
        for column in OWN:
            if row.get(column) is None:
                raise DataError(f"{place}: there is no column {column!r}{did_you_mean(column, row)}")
        try:
            value = float(row["value"])
        except ValueError:
            raise DataError(f"{place}: value: must be a number, not {row['value']!r}") from None
        if row["unit"] not in UNITS:
            raise DataError(f"{place}: unit: must be % or empty, not {row['unit']!r}")
        where = {key: value for key, value in row.items() if key not in OWN and value}
        found.append(Published(where, row["figure"], value, row["unit"], row["source"]))
    return found


def beside_published(runs: Sequence[FinishedRun], published: Sequence[Published]) -> list[dict[str, Any]]:
    """The published figures that are about one of the runs.

    Returns:
        rows with ``run`` (a label), ``figure``, ``unit``, ``ours`` (mean over seeds, or None), ``published``,
        ``difference`` (ours less published, or None) and ``source``.
    """
    rows = []
    for group in grouped(list(runs)):
        for entry in published:
            if entry.is_about(group.runs[0]):
                ours = _mean(group, entry)
                difference = None if ours is None else ours - entry.value
                rows.append(
                    {"run": group.label, "figure": entry.figure, "unit": entry.unit, "ours": ours}
                    | {"published": entry.value, "difference": difference, "source": entry.source}
                )
    return rows


def _mean(group: Group, entry: Published) -> float | None:
    values = [value for run in group.runs if (value := entry.of(run)) is not None]
    return sum(values) / len(values) if len(values) == len(group.runs) else None


def _same(text: str, value: Any) -> bool:
    """Whether a cell says a value of a configuration; numbers count as such."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        try:
            return float(text) == value
        except ValueError:
            return False
    return text == (",".join(map(str, value)) if isinstance(value, list) else str(value))
