"""The gate: each limit on what may be forgotten, checked against what a stage lost."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict, cast

import numpy as np
from numpy.typing import NDArray

from holdfast.api.scorer import Scorer
from holdfast.config.gate import GateConfig
from holdfast.config.reading import validate
from holdfast.errors import ConfigError, GateFailed
from holdfast.metrics.intervals import Examples, intervals, paired_difference, task_intervals
from holdfast.metrics.matrix import LOWER_IS_BETTER, NO_ACCURACY
from holdfast.metrics.summary import by_task, summarize
from holdfast.records.shapes import read_json

if TYPE_CHECKING:
    from holdfast.records.read import FinishedRun

TOLERANCE = 1e-9
"""A figure may be beyond its limit by this much: in floating point, 0.9 - 0.85 is a little more than 0.05."""

NOT_LEARNED = "not learned, so forgetting says nothing"
"""What a reader must know of a task whose own stage did not raise its score beyond its interval."""

OF_SCORES = ("max_forgetting", "max_task_forgetting", "min_average", "min_new_task", "min_learned")
"""The limits in the unit of the tasks' scores."""

Action = Literal["stop", "rollback", "continue"]
DONE: dict[Action, str] = {"stop": "the run stopped", "rollback": "rolled back", "continue": "the run went on"}


class Decision(TypedDict):
    """What a run did after a stage, as run.json keeps it.

    ``current`` is the stage whose weights the run holds from then on, ``checks`` are the :func:`record` of the stage's
    checks, and ``scores`` the stage's own row of the score matrix, which a rollback takes out of matrix.json.
    """

    stage: int
    task: str
    passed: bool
    action: Action
    current: int
    checks: list[dict[str, Any]]
    scores: list[float | None]


@dataclass(frozen=True)
class Check:
    """One figure and its limit.

    Attributes:
        key: the limit's, in :class:`GateConfig`.
        figure: what was measured, in words.
        value: None if a score that it needs is missing.
        limit: in the unit of ``value``.
        interval: 95 %, over test examples; None if it is not known.
        note: what a reader of the figure must know.
    """

    key: str
    figure: str
    value: float | None
    limit: float
    interval: list[float] | None = None
    note: str = ""

    @property
    def beyond(self) -> float | None:
        """How far the value is on the wrong side of the limit; negative on the right side."""
        if self.value is None:
            return None
        return self.value - self.limit if self.key.startswith("max_") else self.limit - self.value

    @property
    def passed(self) -> bool:
        """Whether the value is known and on the right side of the limit."""
        return self.beyond is not None and self.beyond <= TOLERANCE

    @property
    def sure(self) -> bool:
        """Whether the limit lies outside the interval: other test examples would most likely give the same verdict."""
        return self.interval is not None and not self.interval[0] <= self.limit <= self.interval[1]

    @property
    def verdict(self) -> str:
        """The outcome in words."""
        if self.value is None:
            outcome = "not measured"
        elif self.passed:
            outcome = "passed"
        else:
            outcome = "failed" if self.sure or self.interval is None else "failed; the limit lies in the interval"
        return f"{outcome}; {self.note}" if self.note else outcome


@dataclass(frozen=True)
class Increase:
    """A limit: ``amount`` in the figure's unit or, of the rise of a loss, ``amount`` times the loss before."""

    amount: float
    relative: bool

    @classmethod
    def read(cls, limit: float | str) -> Increase:
        """Read a limit of :class:`GateConfig`: 0.05, or "2%"."""
        if isinstance(limit, str):
            return cls(float(limit.removesuffix("%")) / 100, True)
        return cls(limit, False)

    def nats(self, before: float) -> float:
        """The limit in nats a token, for a loss that was ``before``."""
        return self.amount * before if self.relative else self.amount

    def __str__(self) -> str:
        return f"{100 * self.amount:g}%" if self.relative else f"{self.amount:g}"


def general_loss(name: str, value: float) -> float:
    """The loss on general text in nats a token, from a measure that is a perplexity or a loss."""
    return math.log(value) if name.startswith("perplexity") else value


def rise_of_loss(name: str, before: float, after: float) -> float | None:
    """By which share of itself a loss on general text rose, of a perplexity or a loss; None where it was 0."""
    first, last = general_loss(name, before), general_loss(name, after)
    return (last - first) / first if first else None


def is_general_loss(name: str) -> bool:
    """Whether a measure of general ability, by its name in matrix.json, is a perplexity or a loss."""
    return name.startswith(LOWER_IS_BETTER)


def is_accuracy(name: str) -> bool:
    """Whether a measure of general ability, by its name in matrix.json, is accuracy-like."""
    return not name.startswith(NO_ACCURACY)


def judge(run: FinishedRun, gate: GateConfig, row: int) -> list[Check]:
    """Check the model of a row of the score matrix against every limit.

    Figures over tasks are those of the tasks learned by then, as if the stream had ended there. Limits on forgetting
    give no check while there is nothing to forget. A run that learned nothing fails, whatever its limits.

    Args:
        run: read from its directory.
        gate: the limits.
        row: of the score matrix, from 1.

    Raises:
        ConfigError: a limit needs a score that the run does not measure.
    """
    check_limits(gate, run.matrix["general"], run.scorers.values())
    figures = StageFigures(run, row)
    checks = []
    for key, limit in gate.limits.items():
        amount = limit if key == "max_general_loss_increase" else Increase.read(limit).amount
        checks += getattr(figures, key)(amount)
    return [*_nothing_learned(run, figures.tasks), *checks]


def _nothing_learned(run: FinishedRun, tasks: Sequence[str]) -> list[Check]:
    """A check that fails, if no task was learned: then nothing could be forgotten, and the limits say nothing."""
    learned = [run.learned[task] for task in tasks if task in run.learned]
    if not learned or any(learned):
        return []
    note = "one test row says nothing" if any(task in run.one_row for task in tasks) else ""
    return [Check("min_tasks_learned", "tasks learned", 0.0, 1.0, note=note)]


class StageFigures:
    """The figures of a row of the score matrix, over the tasks learned by then, as if the stream had ended there.

    Each limit of the gate is a method of its name, which makes the checks.

    Attributes:
        tasks: those learned by then.
        scorers: of these tasks.
        scores: S up to the row, of these tasks.
    """

    def __init__(self, run: FinishedRun, row: int):
        self.run, self.row = run, row
        self.resamples: int = run.config["evaluation"]["bootstrap"]
        self.tasks = run.tasks if run.joint else run.tasks[:row]
        self.scorers = [run.scorers[task] for task in self.tasks]
        self.totals = run.totals[: len(self.tasks)]
        self.scores = [stage[: len(self.tasks)] for stage in run.scores[: row + 1]]

    def max_forgetting(self, limit: float) -> list[Check]:
        if self.run.joint or len(self.tasks) < 2:
            return []
        return [replace(self._of_summary("max_forgetting", "forgetting", limit), note=self._note(self.tasks[:-1]))]

    def max_task_forgetting(self, limit: float) -> list[Check]:
        if self.run.joint:
            return []
        return [
            Check("max_task_forgetting", f"forgetting of {task}", value, limit, interval, self._note([task]))
            for task, (value, interval) in zip(self.tasks[:-1], self.forgotten(), strict=False)
        ]

    def _note(self, tasks: Sequence[str]) -> str:
        """What the forgetting of tasks says, where some of them were not learned."""
        missing = [task for task in tasks if not self.run.learned.get(task, True)]
        return f"{NOT_LEARNED} of {', '.join(missing)}" if missing else ""

    def min_average(self, limit: float) -> list[Check]:
        return [self._of_summary("min_average", "average", limit)]

    def min_new_task(self, limit: float) -> list[Check]:
        checks = []
        for j in range(len(self.tasks)) if self.run.joint else [len(self.tasks) - 1]:
            interval = None
            if self.resamples:
                alone: Examples = [[None], [self.examples[self.row][j]]]
                interval = intervals(alone, totals=[self.totals[j]], resamples=self.resamples)["average"]
            score = self.scores[self.row][j]
            checks.append(Check("min_new_task", f"score of {self.tasks[j]}", score, limit, interval))
        return checks

    def min_learned(self, limit: float) -> list[Check]:
        checks = []
        for j in range(len(self.tasks)) if self.run.joint else [len(self.tasks) - 1]:
            gain, interval = self.run.gains[j]
            checks.append(Check("min_learned", f"rise of {self.tasks[j]} in its own stage", gain, limit, interval))
        return checks

    def max_general_loss_increase(self, limit: float | str) -> list[Check]:
        checks, increase = [], Increase.read(limit)
        for name, values in self.run.matrix["general"].items():
            if not is_general_loss(name):
                continue
            value, allowed, note = None, increase.amount, ""
            if None not in (values[0], values[self.row]):
                before = general_loss(name, values[0])
                value, allowed = general_loss(name, values[self.row]) - before, increase.nats(before)
                note = f"the limit is {increase} of {before:.3f}" if increase.relative else ""
            figure = f"rise of the loss on {name.removeprefix('perplexity/')}"
            interval = self._general_interval(name, 0, self.row)
            checks.append(Check("max_general_loss_increase", figure, value, allowed, interval, note))
        return checks

    def max_general_drop(self, limit: float) -> list[Check]:
        checks = []
        for name, values in self.run.matrix["general"].items():
            if is_accuracy(name):
                value = None if None in (values[0], values[self.row]) else values[0] - values[self.row]
                interval = self._general_interval(name, self.row, 0)
                checks.append(Check("max_general_drop", f"fall of {name}", value, limit, interval))
        return checks

    @cached_property
    def examples(self) -> list[list[NDArray[np.float64] | None]]:
        """Statistics of the test examples, [row][task]."""
        return [row[: len(self.tasks)] for row in self.run.examples(self.row)]

    @cached_property
    def summary(self) -> dict[str, float | None]:
        general = {name: values[: self.row + 1] for name, values in self.run.matrix["general"].items()}
        return summarize(self.scores, metrics=self.scorers, general=general)

    @cached_property
    def by_task(self) -> dict[str, list[float | None]]:
        """What became of each task, as :func:`holdfast.metrics.summary.by_task` gives it."""
        return by_task(self.scores, metrics=self.scorers)

    def forgotten(self) -> list[tuple[float | None, list[float] | None]]:
        """The forgetting of each task, and its interval; the last task's is None."""
        ends: Sequence[list[float] | None] = [None] * len(self.tasks)
        if self.resamples:
            found = task_intervals(self.examples, metrics=self.scorers, totals=self.totals, resamples=self.resamples)
            ends = found["forgetting"]
        return list(zip(self.by_task["forgetting"], ends, strict=True))

    @cached_property
    def summary_intervals(self) -> dict[str, list[float] | None]:
        if not self.resamples:
            return {}
        return intervals(self.examples, metrics=self.scorers, totals=self.totals, resamples=self.resamples)

    def _of_summary(self, key: str, figure: str, limit: float) -> Check:
        return Check(key, figure, self.summary[figure], limit, self.summary_intervals.get(figure))

    def _general_interval(self, name: str, first: int, second: int) -> list[float] | None:
        """95 % interval of a general ability at row ``second`` less row ``first``, of a loss in nats: a bootstrap over
        its texts or questions."""
        if not self.resamples or None in (self.run.matrix["general"][name][row] for row in (first, second)):
            return None
        before, after = (self.run.general_statistics(row, name) for row in (first, second))
        if before is None or after is None or before.shape != after.shape:
            return None
        quotient = [lambda sums: sums[..., 0] / sums[..., 1]]
        rise = paired_difference([before], [after], totals=quotient, resamples=self.resamples, permutations=1)
        return cast(list[float] | None, rise["interval"])


@dataclass(frozen=True)
class Judged:
    """A stage of a run, held against limits.

    Attributes:
        title: the run and the stage in words.
        row: of the score matrix.
        checks: one a figure.
    """

    title: str
    run: FinishedRun
    row: int
    checks: list[Check]


def judge_directory(path: Path, limits: dict[str, Any], stage: int | None) -> Judged:
    """Check a run's directory against limits.

    Args:
        path: the run's directory.
        limits: by key of :class:`GateConfig`; if there are none, those of the run's configuration.
        stage: the stage after which the model is checked; None: the last one that was evaluated.

    Raises:
        RunDirectoryError: there is no run, or none that was evaluated.
        ConfigError: there are no limits although something was learned, one of them cannot be used, or the stage was
            not evaluated.
    """
    from holdfast.records.read import read_run

    run = read_run(path)
    limits = limits or run.config.get("gate") or {}
    if not limits and (checks := _nothing_learned(run, run.tasks)):
        return Judged(f"{path} ({run.method})", run, len(run.scores) - 1, checks)
    if not limits:
        raise ConfigError(f"{path}: its configuration has no gate; give a limit, for example --max-forgetting 0.05")
    gate = validate(GateConfig, limits, str(path))
    measured = [t for t, row in enumerate(run.scores) if t and any(score is not None for score in row)]
    rows = {run.stage_of(t) if run.joint else t: t for t in measured}
    if not rows or (stage is not None and stage not in rows):
        evaluated = f"evaluated: {', '.join(map(str, rows))}" if rows else "none was evaluated yet"
        which = "the last stage" if stage is None else f"stage {stage}"
        raise ConfigError(f"{path}: {which} cannot be judged; {evaluated}")
    stage = max(rows) if stage is None else stage
    title = f"{path} ({run.method}), after stage {stage}"
    if undone := _undone(run, stage):  # its row of the score matrix is that of the stage which the run went back to
        return Judged(f"{title}, which was rolled back", run, rows[stage], undone)
    return Judged(title, run, rows[stage], judge(run, gate, rows[stage]))


def _undone(run: FinishedRun, stage: int) -> list[Check]:
    """The recorded checks of a stage that failed the run's own gate and was rolled back; empty of any other."""
    return [
        check
        for decision in run.info.get("gate", [])
        if decision["stage"] == stage and not decision["passed"] and decision["action"] == "rollback"
        for check in recorded(decision["checks"])
    ]


def raise_if_failed(path: Path, *, newest: bool = False) -> None:
    """Raise GateFailed if a stage of a run failed its gate, whatever the run did then.

    Args:
        newest: look at the stage that was judged last alone.
    """
    decisions: list[Decision] = read_json(path / "run.json").get("gate", [])
    if newest:
        decisions = decisions[-1:]
    rejected = [f"{d['stage']} ({d['task']}, {DONE[d['action']]})" for d in decisions if not d["passed"]]
    if rejected:
        raise GateFailed(f"the gate failed after stage {', '.join(rejected)}")


def failed(checks: Sequence[Check]) -> list[Check]:
    """The checks that did not pass."""
    return [check for check in checks if not check.passed]


def record(checks: Sequence[Check]) -> list[dict[str, Any]]:
    """Checks as run.json keeps them."""
    return [asdict(check) | {"passed": check.passed} for check in checks]


def recorded(checks: Iterable[Mapping[str, Any]]) -> list[Check]:
    """The checks that :func:`record` made; a key that a version did not write has its default."""
    keys = [field.name for field in fields(Check)]
    return [Check(**{key: check[key] for key in keys if key in check}) for check in checks]


def check_limits(gate: GateConfig, general: Iterable[str], scorers: Iterable[Scorer]) -> None:
    """Check that a run measures what its limits need.

    Args:
        general: the run's measures of general ability, by their names in matrix.json.
        scorers: of its tasks.

    Raises:
        ConfigError: it does not.
    """
    names = list(general)
    for key, wanted, kind in (
        ("max_general_loss_increase", is_general_loss, "loss on general text"),
        ("max_general_drop", is_accuracy, "accuracy-like general ability"),
    ):
        if key in gate.limits and not any(map(wanted, names)):
            raise ConfigError(f"gate.{key}: the run measures no {kind}; name one in evaluation.general")
    lower = [scorer.name for scorer in scorers if scorer.lower_is_better]
    for key in OF_SCORES:
        if isinstance(gate.limits.get(key), str) and lower:
            raise ConfigError(
                f"gate.{key}: {gate.limits[key]} is a share of a score from 0 to 1, a task is scored by {lower[0]}, "
                "in nats; give nats a token, such as 0.05"
            )
    for key in ("min_average", "min_new_task"):
        if key in gate.limits and lower:
            raise ConfigError(f"gate.{key}: a task is scored by {lower[0]}, of which lower is better; leave it out")
