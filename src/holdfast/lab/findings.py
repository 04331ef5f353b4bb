"""The findings of an experiment: each claim of the paper with an estimate, its interval over seeds, and a verdict."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field, model_validator

from holdfast.config.section import Section
from holdfast.lab.derived import interval, slope
from holdfast.lab.tables import TableRow, distinct

Rows = Sequence[TableRow]


class Share(Section):
    """Where one set of runs lies between a second and a third."""

    worst: dict[str, Any] = Field(description="columns and values of the runs at share 0")
    best: dict[str, Any] | None = Field(
        None, description="columns and values of the runs at share 1; where absent, share 1 is at 0"
    )


class Finding(Section):
    """A claim about the column ``value`` of the table of runs, estimated for each seed.

    With ``where`` alone, it is the mean of the column. With ``minus``, it is the difference of the means,
    where − minus. With ``share``, it is (worst − where) / (worst − best), for example the share of the forgetting that
    a kind of replay prevents. With ``over``, it is the slope over the binary logarithm of that column, the change at
    each doubling; with ``held``, this slope at equal values of another column, over all runs.
    """

    claim: str = Field(description="what the paper says, in words")
    value: str = Field(description="column of the table of runs")
    where: dict[str, Any] = Field(
        default_factory=dict, description="columns and values of the runs; a list of values means any of them"
    )
    minus: dict[str, Any] | None = Field(None, description="columns and values of the runs to subtract")
    share: Share | None = Field(None, description="the two sets of runs between which the first one lies")
    over: str | None = Field(None, description="numeric column over whose logarithm the slope is taken")
    held: str | None = Field(None, description="numeric column at whose equal values the slope is taken")
    take: Literal["mean", "min"] = Field("mean", description="of several runs of a seed: their mean or their least")
    above: float | None = Field(None, description="the claim holds above this; 0 where neither is given")
    below: float | None = Field(None, description="the claim holds below this")

    @model_validator(mode="after")
    def _one_way(self) -> Finding:
        if sum(way is not None for way in (self.minus, self.share, self.over)) > 1:
            raise ValueError("give at most one of minus, share and over")
        if self.held is not None and self.over is None:
            raise ValueError("held: holds a column while a slope is taken, so it needs over")
        if self.above is not None and self.below is not None:
            raise ValueError("give above or below, not both")
        return self

    @property
    def expected(self) -> str:
        """The claim as an inequality."""
        return f"< {self.below:g}" if self.below is not None else f"> {self.above or 0:g}"


def judge(finding: Finding, rows: Rows) -> dict[str, Any]:
    """Estimate a claim from the table of runs.

    Returns:
        claim, value, expected, estimate, low, high (95 %, Student's t over seeds; None with one seed), seeds, and the
        verdict: ``holds`` (the whole interval is on the expected side), ``sign only`` (the estimate is), ``does not
        hold``, or ``not measured``.
    """
    of_seeds = [_of_seed(finding, matching(rows, {"seed": seed})) for seed in distinct(rows, "seed")]
    estimates = [estimate for estimate in of_seeds if estimate is not None]
    judged: dict[str, Any] = {"claim": finding.claim, "value": finding.value, "expected": finding.expected}
    if not estimates:
        return judged | {"estimate": None, "low": None, "high": None, "seeds": 0, "verdict": "not measured"}
    mean, half = interval(estimates)
    low, high = (mean - half, mean + half) if half is not None else (None, None)
    bound = finding.below if finding.below is not None else finding.above or 0.0
    sign = -1 if finding.below is not None else 1
    worst = low if sign > 0 else high
    if worst is not None and sign * (worst - bound) > 0:
        verdict = "holds"
    else:
        verdict = "sign only" if sign * (mean - bound) > 0 else "does not hold"
    return judged | {"estimate": mean, "low": low, "high": high, "seeds": len(estimates), "verdict": verdict}


def matching(rows: Rows, where: dict[str, Any]) -> list[TableRow]:
    """The rows whose columns have the values; a list of values means any of them."""
    return [
        row
        for row in rows
        if all(row.get(c) in value if isinstance(value, list) else row.get(c) == value for c, value in where.items())
    ]


def markdown(findings: Sequence[dict[str, Any]]) -> str:
    """Judged findings as a table."""
    lines = ["| claim | measured | expected | estimate [95 %] | seeds | verdict |", "|---|---|---|---|---|---|"]
    for judged in findings:
        cells = [
            judged["claim"],
            judged["value"],
            judged["expected"],
            estimate(judged),
            str(judged["seeds"]),
            judged["verdict"],
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def estimate(judged: dict[str, Any]) -> str:
    """The estimate of a judged finding with its interval, for people."""
    if judged["estimate"] is None:
        return "–"
    shown = _number(judged["estimate"])
    if judged["low"] is not None:
        shown += f" [{_number(judged['low'])}, {_number(judged['high'])}]"
    return shown.replace("-", "−")


def _number(value: float) -> str:
    if 0.01 <= abs(value) < 100 or value == 0:
        return f"{value:.3f}"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1g}"


def _of_seed(finding: Finding, rows: Rows) -> float | None:
    value = lambda where: _level(finding, matching(rows, finding.where | where))  # noqa: E731
    if finding.over is not None and finding.held is not None:
        runs = [row for row in matching(rows, finding.where) if row.get(finding.value) is not None]
        xs, held = [math.log2(row[finding.over]) for row in runs], [row[finding.held] for row in runs]
        enough = len(runs) > 2 and len(set(xs)) > 1 and len(set(held)) > 1
        return slope(xs, [row[finding.value] for row in runs], held) if enough else None
    if finding.over is not None:
        column = finding.over
        points = [(math.log2(x), value({column: x})) for x in distinct(matching(rows, finding.where), column)]
        measured = [(x, y) for x, y in points if y is not None]
        return slope(*zip(*measured, strict=True)) if len(measured) > 1 else None
    level = value({})
    if finding.minus is not None:
        other = value(finding.minus)
        return None if level is None or other is None else level - other
    if finding.share is not None:
        worst, best = value(finding.share.worst), 0.0 if finding.share.best is None else value(finding.share.best)
        if level is None or worst is None or best is None or worst == best:
            return None
        return (worst - level) / (worst - best)
    return level


def _level(finding: Finding, rows: Rows) -> float | None:
    values = [row[finding.value] for row in rows if row.get(finding.value) is not None]
    if not values:
        return None
    return min(values) if finding.take == "min" else sum(values) / len(values)
