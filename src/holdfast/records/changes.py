"""Answers at two evaluations of a run: what went from right to wrong, and from wrong to right."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from holdfast.records.gate import is_accuracy
from holdfast.records.read import FinishedRun

RIGHT = 0.5
"""A score of at least this is right, and a change of at least this a change from right to wrong or back."""

Pair = tuple[dict[str, Any], dict[str, Any]]


@dataclass
class Changes:
    """The test rows of a task, or the questions of a general ability, at two evaluations.

    Attributes:
        name: of the task or the ability.
        then, last: the rows of the score matrix at which they were.
        since: when the first one was, in words.
        pairs: (before, after) of each row, in order.
        lost: the pairs that went from right to wrong, worst first.
        gained: the pairs that went from wrong to right, best first.
        beside: the metric that says what is right, where the task's own is a loss.
    """

    name: str
    then: int
    last: int
    since: str
    pairs: list[Pair]
    lost: list[Pair]
    gained: list[Pair]
    beside: str | None = None

    @property
    def rows(self) -> int:
        return len(self.pairs)

    @property
    def has_texts(self) -> bool:
        """Whether the answers themselves were kept, not their scores alone."""
        return all("response" in row for row in self.pairs[0])


def changes(run: FinishedRun, j: int) -> Changes | None:
    """Compare the answers to task j at the end with those right after its own stage.

    A task that was learned last is compared with the model before training. A score of at least a half is right. A row
    is lost if it went from right to wrong, and gained if it went from wrong to right, by a half or more: with a metric
    that gives only 0 and 1, whenever it changed. Of a task that is scored by its loss, the first metric beside it
    counts.

    Returns:
        None if they are not there, or the task is scored by its loss alone.
    """
    measured = [t for t, row in enumerate(run.scores) if row[j] is not None]
    task = run.tasks[j]
    beside = next(iter(run.matrix.get("beside", {}).get(task, {})), None) if run.lower_is_better(j) else None
    if not measured or (run.lower_is_better(j) and beside is None):
        return None
    last = measured[-1]
    then = run.own_stage(j) if run.own_stage(j) in measured[:-1] else measured[0]
    if run.stage_of(then) == run.stage_of(last):
        return None
    before = {(row["row"], row.get("number")): row for row in run.responses(then, task)}
    after = [((row["row"], row.get("number")), row) for row in run.responses(last, task)]
    pairs = [(before[place], row) for place, row in after if place in before]
    if beside is not None:
        pairs = [(_by(beside, one), _by(beside, other)) for one, other in pairs]
    found = _compared(run, task, then, last, pairs)
    return found and replace(found, beside=beside)


def _by(metric: str, row: dict[str, Any]) -> dict[str, Any]:
    """A row of responses with the score that a metric beside the task's own gives it; None where that is not known."""
    return row | {"score": row.get("beside", {}).get(metric)}


def general_changes(run: FinishedRun, name: str) -> Changes | None:
    """Compare the answers to an accuracy-like general ability at the end with those before training.

    Args:
        name: in matrix.json.

    Returns:
        None if it was not measured at both, or is no share of right answers. Where the answers were not kept, the pairs
        have their row and score alone.
    """
    measured = [t for t, value in enumerate(run.matrix["general"][name]) if value is not None]
    if not is_accuracy(name) or not measured or measured[0] != 0:
        return None
    last = measured[-1]
    if run.stage_of(last) == 0:
        return None
    before, after = (run.general_responses(row, name) or _scores(run, row, name) for row in (0, last))
    return _compared(run, name, 0, last, list(zip(before, after, strict=False)) if len(before) == len(after) else [])


def _scores(run: FinishedRun, row: int, name: str) -> list[dict[str, Any]]:
    """The scores of a general ability's questions, without what was asked."""
    statistics = run.general_statistics(row, name)
    counted = [] if statistics is None or not (statistics[:, 1] == 1).all() else statistics[:, 0].tolist()
    return [{"row": i, "score": score} for i, score in enumerate(counted)]


def _compared(run: FinishedRun, name: str, then: int, last: int, pairs: list[Pair]) -> Changes | None:
    pairs = [pair for pair in pairs if None not in (pair[0]["score"], pair[1]["score"])]
    if not pairs:
        return None
    change = [after["score"] - first["score"] for first, after in pairs]
    ranked = sorted(range(len(pairs)), key=lambda i: (-abs(change[i]), i))
    return Changes(
        name=name,
        then=then,
        last=last,
        since=run.stage_names()[then],
        pairs=pairs,
        lost=[pairs[i] for i in ranked if change[i] <= -RIGHT and pairs[i][1]["score"] < RIGHT],
        gained=[pairs[i] for i in ranked if change[i] >= RIGHT and pairs[i][0]["score"] < RIGHT],
    )
