"""A page's first picture: how far each score went, from when it was learned to the end, on one line each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from holdfast.records.gate import is_accuracy
from holdfast.records.read import FinishedRun

MOST = 12
"""Lines of a picture, at most."""


@dataclass(frozen=True)
class Fall:
    """A line: a score then and now. Either is None where it was not measured.

    Attributes:
        start: the score before training, of a task.
        lower: whether a lower score is better.
        same: whether nothing lies between then and now: the task was learned last.
    """

    name: str
    then: float | None
    now: float | None
    start: float | None = None
    lower: bool = False
    same: bool = False

    @property
    def change(self) -> float | None:
        """How much better it is now."""
        if self.then is None or self.now is None or self.same:
            return None
        return self.then - self.now if self.lower else self.now - self.then


@dataclass(frozen=True)
class Picture:
    """Lines on one axis, from 0 to ``end``.

    Attributes:
        left_out: how many more there are, which fell less.
    """

    title: str
    lines: list[Fall]
    then: str
    end: float
    left_out: int = 0

    @property
    def has_start(self) -> bool:
        """Whether a line has a score before training."""
        return any(line.start is not None for line in self.lines)

    def place(self, value: float) -> str:
        """Where a value stands on the axis, as CSS writes it."""
        return f"{100 * min(max(value / self.end, 0), 1):.1f}%"


def run_pictures(run: FinishedRun, scales: Sequence[Sequence[int]]) -> list[Picture]:
    """The tasks of a run, those that share a scale together, and its accuracy-like general abilities.

    Args:
        scales: the numbers of the tasks that share a scale.
    """
    measured = [t for t, row in enumerate(run.scores) if any(score is not None for score in row)]
    last = measured[-1] if measured else 0
    then = "before training" if _from_start(run) else "right after it was learned"
    pictures = []
    for columns in scales:
        lines = [_task(run, j, last) for j in columns if _begun(run, j, last)]
        lower = run.lower_is_better(columns[0])
        metrics = sorted({run.matrix["metrics"][run.tasks[j]] for j in columns})
        pictures.append(_picture(f"Tasks ({', '.join(metrics)})", lines, then, fraction=not lower))
    names = [name for name in run.matrix["general"] if is_accuracy(name)]
    lines = [Fall(name, values[0], values[last]) for name in names if (values := run.matrix["general"][name])]
    pictures.append(_picture("General abilities", lines, "before training", fraction=True))
    return [picture for picture in pictures if picture.lines]


def comparison_pictures(rows: Sequence[dict[str, Any]], lower: bool) -> list[Picture]:
    """The mean over the tasks of each group of runs, and over its accuracy-like general abilities."""
    tasks = [Fall(row["run"], row["new_task"], row["average"], lower=lower) for row in rows]
    pictures = [Picture("All tasks", tasks, "right after each was learned", _end(tasks, not lower))]
    if any(row["general_change"] is not None for row in rows):
        general = [Fall(row["run"], *mean_general(row)) for row in rows]
        pictures.append(Picture("General ability", general, "before training", 1.0))
    return [picture for picture in pictures if any(line.now is not None for line in picture.lines)]


def _begun(run: FinishedRun, j: int, last: int) -> bool:
    """Whether a task was learned by then, or never will be."""
    return run.untrained or run.own_stage(j) <= last


def _from_start(run: FinishedRun) -> bool:
    """Whether a change is told from before training, since no task was learned before another."""
    return run.joint or run.untrained or len(run.tasks) == 1


def _task(run: FinishedRun, j: int, last: int) -> Fall:
    own, scores = run.own_stage(j), [row[j] for row in run.scores]
    name, lower = run.tasks[j], run.lower_is_better(j)
    if _from_start(run):
        return Fall(name, scores[0], scores[last], lower=lower, same=run.untrained)
    return Fall(name, scores[own], scores[last], scores[0], lower, same=run.stage_of(own) == run.stage_of(last))


def _picture(title: str, lines: list[Fall], then: str, fraction: bool) -> Picture:
    changes = [line.change or 0.0 for line in lines]
    worst = sorted(range(len(lines)), key=changes.__getitem__)
    kept = sorted(worst[:MOST])
    return Picture(title, [lines[i] for i in kept], then, _end(lines, fraction), len(lines) - len(kept))


def _end(lines: Sequence[Fall], fraction: bool) -> float:
    values = [value for line in lines for value in (line.then, line.now, line.start) if value is not None]
    return max([1.0 if fraction else 0.0, *values]) or 1.0


def mean_general(row: dict[str, Any]) -> tuple[float | None, float | None]:
    """The mean of the accuracy-like general abilities of a group of runs, before training and at the end."""
    ends = [values for name, values in row["general"].items() if is_accuracy(name)]
    first, last = (_mean([pair[i] for pair in ends]) for i in (0, 1))
    return first, last


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None
