"""What happened, in sentences for people: the first thing that a page says."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from holdfast.records.gate import is_accuracy, is_general_loss, rise_of_loss
from holdfast.records.read import FinishedRun
from holdfast.report.compare import Comparison
from holdfast.report.falls import mean_general
from holdfast.report.text import at_chance, learning, number, share

COUNTS = ("accuracy", "match", "choice")
"""A metric with one of these in its name counts right answers."""


def run_headline(run: FinishedRun) -> list[str]:
    """What became of a run's tasks and general abilities."""
    note = learning(run.learned, run.one_row)
    sentences = [_done(run), *([note] if note else [])]
    if note is None or any(run.learned.values()):
        sentences += _forgotten(run)
    sentences += [*_general(run), *_general_losses(run)]
    if (low := at_chance(run.matrix)) is not None:
        sentences.append(low)
    return sentences + _history(run)


def comparison_headline(found: Comparison, tasks: int, metrics: Collection[str]) -> list[str]:
    """Which method remembers most, beside the baseline or, if it is that itself, the one that remembers least; and what
    the references reach. Nothing is said of runs that cannot be compared.
    """
    value, sentences = _value(metrics), []
    known = [row for row in found.rows if row["reference"] is None and row["average"] is not None]
    if any("average" in row["best"] for row in known):
        ranked = sorted(known, key=lambda row: row["average"], reverse=not found.lower)
        best = ranked[0]
        other = next((row for row in ranked[1:] if row["run"] == found.baseline), ranked[-1])
        sentences = [
            f"Of {len(known)} methods, {best['run']} remembers most: after learning {_tasks(tasks)}, it ends with "
            f"{value(best)}, and {other['run']} with {value(other, short=True)}.",
            *_forgotten_by(best, other),
            *_general_of(best, other),
        ]
    references = [row for row in found.rows if row["reference"] and row["average"] is not None]
    if references:
        reached = "; ".join(f"{row['run']} {value(row, short=True)}" for row in references)
        sentences.append(f"For reference: {reached}.")
    return sentences


def _forgotten_by(best: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """How far the earlier tasks fell from their best, with the best and another of the methods."""
    if None in (best["forgetting"], other["forgetting"]):
        return []
    falls = ["nothing" if round(row["forgetting"], 3) <= 0 else number(row["forgetting"]) for row in (other, best)]
    if falls == ["nothing"] * 2:
        return ["Neither forgot anything of the earlier tasks."]
    return [
        f"Of an earlier task's best score, {other['run']} lost {falls[0]} and {best['run']} {falls[1]}, on average."
    ]


def _general_of(best: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """How general ability changed with both."""
    (first, low), (start, high) = (mean_general(row) for row in (other, best))
    if first is None or low is None or start is None or high is None or abs(first - start) >= 0.005:
        return []
    return [
        f"General ability went from {share(first)} to {share(low)} with {other['run']}, to {share(high)} with "
        f"{best['run']}."
    ]


def _value(metrics: Collection[str]) -> Any:
    """How the average of a row is told: as a share of right answers, if all metrics count these."""
    counted = _counts(metrics)

    def told(row: dict[str, Any], short: bool = False) -> str:
        if counted:
            return share(row["average"]) + ("" if short else " of the answers right")
        return number(row["average"]) if short else f"an average of {number(row['average'])}"

    return told


def _counts(metrics: Collection[str]) -> bool:
    return all(any(part in metric for part in COUNTS) for metric in metrics)


def _tasks(count: int) -> str:
    return f"{count} tasks one after another" if count > 1 else "one task"


def _done(run: FinishedRun) -> str:
    """What was learned, and how well the model does at the end."""
    count, average = len(run.tasks), run.matrix["summary"]["average"]
    if run.untrained:
        what = "Without any training"
    elif not run.finished:
        done = max((t for t, row in enumerate(run.scores) if any(score is not None for score in row)), default=0)
        return f"The model has learned {0 if run.joint else done} of {count} tasks so far."
    elif run.joint:
        what = f"After learning {count} tasks all at once" if count > 1 else "After learning its task"
    else:
        what = f"After learning {_tasks(count)}"
    metrics = run.matrix["metrics"].values()
    if average is None:
        return f"{what}, the model was measured on each of them." if count > 1 else f"{what}, the model was measured."
    over = ", on average over the tasks" if count > 1 else ""
    told, first = share if _counts(metrics) else number, run.scores[0][0]
    before = f"; before, {told(first)}" if count == 1 and first is not None and not run.untrained else ""
    if _counts(metrics):
        return f"{what}, the model answers {share(average)} of the test questions right{over}{before}."
    kinds = sorted(set(metrics))
    name = kinds[0].replace("_", " ") if len(kinds) == 1 else "score"
    return f"{what}, the model has {'an' if name[0] in 'aeiou' else 'a'} {name} of {number(average)}{over}{before}."


def _forgotten(run: FinishedRun) -> list[str]:
    """How far the earlier tasks fell from their best; empty where that is not known."""
    forgetting = run.matrix["summary"]["forgetting"]
    if forgetting is None or run.joint or len(run.tasks) < 2:
        return []
    sign = -1 if run.lower_is_better(0) else 1
    earlier = range(len(run.tasks) - 1)
    end = _mean([run.scores[-1][j] for j in earlier])
    if end is None:
        return []
    told = share if _counts(run.matrix["metrics"].values()) else number
    best, name = told(end + sign * forgetting), "earlier tasks" if len(earlier) > 1 else "earlier task"
    ends = run.matrix["intervals"].get("forgetting")
    if round(forgetting, 3) == 0:
        return ["Nothing was forgotten."]
    if forgetting < 0:
        return [f"Nothing was forgotten: the {name} went from {best} at their best to {told(end)}."]
    if ends and ends[0] <= 0 <= ends[1]:
        return [
            f"The {name} went from {best} at their best to {told(end)}, which these test rows cannot tell from no "
            "change."
        ]
    went = "fell" if sign > 0 else "rose"
    return [f"The {name} {went} from {best} at their best to {told(end)}: that was forgotten."]


def _general(run: FinishedRun) -> list[str]:
    """How general ability changed; empty where no accuracy-like one was measured at both ends."""
    change = run.matrix["summary"]["general_change"]
    names = [name for name in run.matrix["general"] if is_accuracy(name)]
    first = _mean([run.matrix["general"][name][0] for name in names])
    if change is None or first is None:
        return []
    what = "General ability" + (f" ({names[0]})" if len(names) == 1 else "")
    if round(change, 3) == 0:
        return [f"{what} stayed at {share(first)}."]
    return [f"{what} {'fell' if change < 0 else 'rose'} from {share(first)} to {share(first + change)}."]


def _general_losses(run: FinishedRun) -> list[str]:
    """Which losses on general text rose, by a hundredth at least."""
    rises = []
    for name, values in run.matrix["general"].items():
        first, last = values[0], values[-1]
        if is_general_loss(name) and first is not None and last is not None:
            rise = rise_of_loss(name, first, last)
            if rise is not None and rise >= 0.01:
                shown = name.removeprefix("perplexity/")
                text = "what the model wrote of itself" if shown == "own" else shown
                rises.append(f"on {text} by {rise:.1%}")
    return [f"The loss rose {' and '.join(rises)}."] if rises else []


def _history(run: FinishedRun) -> list[str]:
    """Rollbacks, rebuilds and accepted changes."""
    sentences = []
    for back in run.info.get("rollbacks", []):
        to = f"stage {back['to']}" if back["to"] else "the model before training"
        sentences.append(f"At {back['at']}, after stage {back['after']}, the run was set to {to}.")
    for made in run.info.get("rebuilt", []):
        gone = [
            *made.get("tasks", []),
            *made.get("undone", []),
            *(f"rows of {task}" for task in made.get("rows_of", [])),
        ]
        sentences.append(f"At {made['at']} it was made again without {', '.join(gone)}.")
    for change in run.info.get("changes", []):
        if "accepted" in change:
            what = "; ".join(change["accepted"])
            sentences.append(f"At {change['at']} it went on with changed inputs, so scores do not compare: {what}.")
    return sentences


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None
