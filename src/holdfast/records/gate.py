"""The gate: whether a stage kept to the limits on what may be forgotten, and by how much it did not."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from holdfast.api.scorer import Scorer
from holdfast.config.gate import GateConfig
from holdfast.config.reading import validate
from holdfast.errors import ConfigError, GateFailed
from holdfast.metrics.intervals import intervals, paired_difference, task_intervals
from holdfast.metrics.matrix import LOWER_IS_BETTER, NO_ACCURACY
from holdfast.metrics.summary import by_task, summarize
from holdfast.system.files import read_json

if TYPE_CHECKING:
    from holdfast.records.read import FinishedRun

TOLERANCE = 1e-9
"""0.9 less 0.85 is a little more than 0.05 to a computer; such a figure keeps to a limit of 0.05."""


@dataclass(frozen=True)
class Check:
    """One figure against its limit.

    Attributes:
        key: of :class:`GateConfig`.
        figure: what was measured, in words.
        value: None where a score that it needs is missing.
        limit: in the unit of ``value``.
        interval: 95 %, over test examples; None where it is not known.
    """

    key: str
    figure: str
    value: float | None
    limit: float
    interval: list[float] | None = None

    @property
    def beyond(self) -> float | None:
        """By how much the value is on the wrong side of the limit; negative where it keeps to it."""
        if self.value is None:
            return None
        return self.value - self.limit if self.key.startswith("max_") else self.limit - self.value

    @property
    def passed(self) -> bool:
        """Whether the value is known and keeps to the limit."""
        return self.beyond is not None and self.beyond <= TOLERANCE

    @property
    def sure(self) -> bool:
        """Whether the limit lies outside the interval, so that another draw of test examples would say the same."""
        return self.interval is not None and not self.interval[0] <= self.limit <= self.interval[1]

    @property
    def verdict(self) -> str:
        """In words: passed, failed, failed but within its interval, or not measured."""
        if self.value is None:
            return "not measured"
        if self.passed:
            return "passed"
        return "failed" if self.sure or self.interval is None else "failed; the limit lies in the interval"


@dataclass(frozen=True)
class Increase:
    """How far a loss may rise: ``amount`` nats a token, or ``amount`` times what it was."""

    amount: float
    relative: bool

    @classmethod
    def read(cls, limit: float | str) -> Increase:
        """From GateConfig.max_general_loss_increase: 0.05, or "2%"."""
        if isinstance(limit, str):
            return cls(float(limit.removesuffix("%")) / 100, True)
        return cls(limit, False)

    def nats(self, before: float) -> float:
        """The limit on the rise of a loss that was ``before``, in nats a token."""
        return self.amount * before if self.relative else self.amount

    def __str__(self) -> str:
        return f"{100 * self.amount:g}%" if self.relative else f"{self.amount:g}"


def general_loss(name: str, value: float) -> float:
    """A measure of general text in nats a token: the logarithm of a perplexity, a loss as it is."""
    return math.log(value) if name.startswith("perplexity") else value


def is_general_loss(name: str) -> bool:
    """Whether a measure of general ability, by its name in matrix.json, is a perplexity or a loss."""
    return name.startswith(LOWER_IS_BETTER)


def is_accuracy(name: str) -> bool:
    """Whether a measure of general ability, by its name in matrix.json, is accuracy-like."""
    return not name.startswith(NO_ACCURACY)


def judge(run: FinishedRun, gate: GateConfig, row: int) -> list[Check]:
    """Check the model of a row of the score matrix against every limit.

    Figures over tasks are those of the tasks learned by then, as if the stream had ended there. A limit on forgetting
    makes no check before there is anything to forget.

    Args:
        run: read from its directory.
        gate: the limits.
        row: of the score matrix, from 1.

    Raises:
        ConfigError: a limit needs what the run does not measure.
    """
    check_limits(gate, run.matrix["general"], run.scorers.values())
    learned = len(run.tasks) if run.joint else row
    tasks = run.tasks[:learned]
    metrics = [run.scorers[task] for task in tasks]
    scores = [stage[:learned] for stage in run.scores[: row + 1]]
    examples = [[run.statistics(t, j) for j in range(learned)] for t in range(row + 1)]
    totals = run.totals[:learned]
    resamples = run.config["evaluation"]["bootstrap"]
    options: dict[str, Any] = {"metrics": metrics, "totals": totals, "resamples": resamples}
    summary = summarize(scores, metrics=metrics)
    terms = by_task(scores, metrics=metrics)
    ends = intervals(examples, **options) if resamples else {}
    term_ends = task_intervals(examples, **options) if resamples else {}
    checks = []
    for key, limit in gate.limits.items():
        match key:
            case "max_forgetting" if learned > 1 and not run.joint:
                checks.append(Check(key, "forgetting", summary["forgetting"], limit, ends.get("forgetting")))
            case "max_task_forgetting" if not run.joint:
                for j in range(learned - 1):
                    interval = term_ends["forgetting"][j] if term_ends else None
                    checks.append(Check(key, f"forgetting of {tasks[j]}", terms["forgetting"][j], limit, interval))
            case "min_average":
                checks.append(Check(key, "average", summary["average"], limit, ends.get("average")))
            case "min_new_task":
                for j in range(learned) if run.joint else [learned - 1]:
                    alone = [[None], [examples[row][j]]]
                    ends_of_it = intervals(alone, totals=[totals[j]], resamples=resamples) if resamples else {}
                    checks.append(Check(key, f"score of {tasks[j]}", scores[row][j], limit, ends_of_it.get("average")))
            case "max_general_loss_increase":
                checks += _general_losses(run, row, Increase.read(limit))
            case "max_general_drop":
                checks += _general_drops(run, row, limit)
    return checks


def judge_directory(path: Path, limits: dict[str, Any], stage: int | None) -> tuple[str, list[Check]]:
    """Check a run's directory against limits, or where none are given against those of its configuration.

    Args:
        path: the run's directory.
        limits: by key of :class:`GateConfig`.
        stage: after which one; None: after the last one that was evaluated.

    Returns:
        what was judged, in words, and the checks.

    Raises:
        RunDirectoryError: there is no run, or none that was evaluated.
        ConfigError: there are no limits, one of them cannot be used, or no such stage was evaluated.
    """
    from holdfast.records.read import read_run

    run = read_run(path)
    limits = limits or run.config.get("gate") or {}
    if not limits:
        raise ConfigError(f"{path}: its configuration has no gate; give a limit, for example --max-forgetting 0.05")
    gate = validate(GateConfig, limits, str(path))
    measured = [t for t, row in enumerate(run.scores) if t and any(score is not None for score in row)]
    rows = {run.held(t) if run.joint else t: t for t in measured}
    if not rows or (stage is not None and stage not in rows):
        known = f"evaluated: {', '.join(map(str, rows))}" if rows else "none was evaluated yet"
        raise ConfigError(f"{path}: stage {stage or 'last'} cannot be judged; {known}")
    stage = max(rows) if stage is None else stage
    return f"{path} ({run.method}), after stage {stage}", judge(run, gate, rows[stage])


def raise_if_failed(path: Path) -> None:
    """GateFailed if a stage of a run failed its gate, whatever the run did then."""
    decisions = read_json(path / "run.json").get("gate", [])
    lost = [f"{d['stage']} ({d['task']}, {DONE[d['action']]})" for d in decisions if not d["passed"]]
    if lost:
        raise GateFailed(f"the gate failed after stage {', '.join(lost)}")


DONE = {"stop": "the run stopped", "rollback": "rolled back", "continue": "the run went on"}


def failed(checks: Sequence[Check]) -> list[Check]:
    """Those that did not pass."""
    return [check for check in checks if not check.passed]


def record(checks: list[Check]) -> list[dict[str, Any]]:
    """Checks as run.json keeps them."""
    return [asdict(check) | {"passed": check.passed} for check in checks]


def check_limits(gate: GateConfig, general: Iterable[str], scorers: Iterable[Scorer]) -> None:
    """See that a run measures what the limits need.

    Args:
        general: its measures of general ability, by their names in matrix.json.
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
    for key in ("min_average", "min_new_task"):
        if key in gate.limits and lower:
            raise ConfigError(f"gate.{key}: a task is scored by {lower[0]}, of which lower is better; leave it out")


def _general_losses(run: FinishedRun, row: int, limit: Increase) -> list[Check]:
    checks = []
    for name, values in run.matrix["general"].items():
        if not is_general_loss(name):
            continue
        value, allowed = None, limit.amount
        if None not in (values[0], values[row]):
            before = general_loss(name, values[0])
            value, allowed = general_loss(name, values[row]) - before, limit.nats(before)
        figure = f"rise of the loss on {name.removeprefix('perplexity/')}"
        checks.append(Check("max_general_loss_increase", figure, value, allowed, _interval(run, name, 0, row)))
    return checks


def _general_drops(run: FinishedRun, row: int, limit: float) -> list[Check]:
    checks = []
    for name, values in run.matrix["general"].items():
        if is_accuracy(name):
            value = None if None in (values[0], values[row]) else values[0] - values[row]
            checks.append(Check("max_general_drop", f"fall of {name}", value, limit, _interval(run, name, row, 0)))
    return checks


def _interval(run: FinishedRun, name: str, first: int, second: int) -> list[float] | None:
    """95 % interval of a general ability at the second row less that at the first, of a loss in nats: bootstrap over
    its texts or questions."""
    resamples = run.config["evaluation"]["bootstrap"]
    if not resamples or None in (run.matrix["general"][name][row] for row in (first, second)):
        return None
    both = [run.general_statistics(row, name) for row in (first, second)]
    if any(entry is None for entry in both) or both[0].shape != both[1].shape:
        return None
    before, after = ([entry] for entry in both)
    totals = [lambda sums: sums[..., 0] / sums[..., 1]]
    return paired_difference(before, after, totals=totals, resamples=resamples, permutations=1)["interval"]
