"""The screen after `holdfast learn`: what was learned, what that cost, and what one does next."""

from __future__ import annotations

import shlex
from pathlib import Path

from rich.console import Console

from holdfast.records.directory import current_stage, learned_stages
from holdfast.records.gate import general_loss, is_general_loss, rise_of_loss
from holdfast.records.read import FinishedRun, read_run
from holdfast.records.shapes import read_json
from holdfast.records.stages import named
from holdfast.report.text import ONE_ROW, number
from holdfast.system.progress import clock

FEW = 0.1
"""A share of right answers below this is as good as none."""


def finished_at(path: Path) -> str | None:
    """When a run was finished; None if it is not, or there is none."""
    return read_json(path / "run.json").get("finished") if (path / "run.json").is_file() else None


def print_learned(path: Path, console: Console) -> None:
    """Print the screen about the newest stage of a run."""
    for line in learned_lines(read_run(path)):
        console.print(line, markup=False, soft_wrap=True)


def learned_lines(run: FinishedRun) -> list[str]:
    """The lines of the screen, each of no more than 80 columns as far as names allow."""
    stage = max((t for t, folder in run.folders.items() if (folder / "stage.json").exists()), default=0)
    if not stage:
        return [f"{run.path}: nothing is learned yet"]
    record = read_json(run.folders[stage] / "stage.json")
    held, before = (current_stage(run.info, t) for t in (stage, stage - 1))
    where = shlex.quote(str(run.path))
    lines = [
        f"stage {stage}: {record['task']}, {record['steps']} steps, {record['tokens']:,} tokens in "
        f"{clock(record['seconds'])}"
    ]
    commands = {f"holdfast serve {where}": "at http://127.0.0.1:8000/v1"}
    if held:
        commands[f"holdfast export {where} --to model"] = "for transformers, PEFT or vLLM"
    if held == stage:
        lines += _gained(run, stage)
        if changed := [*_lost(run, stage), *_general(run, stage)]:
            lines += ["what else changed", *changed]
        commands[f"holdfast rollback {where} --to {before}"] = "back to what it was"
    else:
        lines.append(f"the run went back from it and holds {named(run, held)}")
        commands[f"holdfast status {where}"] = "what it had learned and cost"
    commands[f"holdfast learn DATA --into {where}"] = "the next month"
    widest = max(map(len, commands))
    shown = [f"  {command.ljust(widest)}  # {what}" for command, what in commands.items()]
    return [*lines, "next", *shown, f"  {run.path / 'report.html'}"]


def _gained(run: FinishedRun, stage: int) -> list[str]:
    """What the stage's own task gained."""
    j = stage - 1
    task = run.tasks[j]
    before, after = run.scores[stage - 1][j], run.scores[stage][j]
    gain, ends = run.gains[j]
    line = f"  {run.matrix['metrics'][task]}  {number(before)} -> {number(after)}"
    if gain is not None:
        line += f"  learned {number(gain, True)}"
    if ends:
        line += f" ({number(ends[0], True)} to {number(ends[1], True)})"
    lines = [line]
    for name, values in run.matrix.get("beside", {}).get(task, {}).items():
        lines.append(f"  {name}  {number(values[stage - 1])} -> {number(values[stage])}")
    rates = [values[stage] for values in run.matrix.get("beside", {}).get(task, {}).values()]
    if run.learned.get(task) and rates and all(rate is not None and rate < FEW for rate in rates):
        lines.append("  its answers are not right yet: more epochs, a higher training.learning_rate, or each fact in")
        lines.append("  several wordings would be next; the page shows its answers")
    if task in run.one_row:
        lines.append(f"  {ONE_ROW}: whether it was learned is not known; give more rows, or a test split")
    elif run.learned.get(task) is False:
        lines.append("  not learned: the interval holds 0; known before, or too few rows or epochs")
    return lines


def _lost(run: FinishedRun, stage: int) -> list[str]:
    """What became of the tasks that the weights hold from before."""
    lines = []
    for j, task in ((t - 1, run.tasks[t - 1]) for t in learned_stages(run.info, stage - 1)):
        before, after = run.scores[stage - 1][j], run.scores[stage][j]
        if before is None or after is None:
            lines.append(f"  {task}  not measured")
            continue
        change = (after - before) * (-1 if run.lower_is_better(j) else 1)
        metric = run.matrix["metrics"][task]
        lines.append(f"  {task}  {metric} {number(before)} -> {number(after)} ({_compared(change)})")
    return lines


def _compared(change: float) -> str:
    """A change in words, since of a loss the lower one is better."""
    amount = number(abs(change))
    return "the same" if float(amount.replace(",", "")) == 0 else f"{amount} {'better' if change > 0 else 'worse'}"


def _general(run: FinishedRun, stage: int) -> list[str]:
    """What became of general abilities since before training."""
    lines = []
    for name, values in run.matrix["general"].items():
        first, last = values[0], values[stage]
        if first is None or last is None:
            continue
        shown = name.removeprefix("perplexity/")
        if not is_general_loss(name):
            lines.append(f"  {shown}  {number(first)} -> {number(last)}")
            continue
        rise = rise_of_loss(name, first, last)
        first, last = general_loss(name, first), general_loss(name, last)
        what = "general loss on its own samples" if shown == "own" else f"general loss on {shown}"
        share = "" if rise is None else f" ({round(rise, 3) + 0.0:+.1%} since the start)"
        lines.append(f"  {what}  {number(first)} -> {number(last)}{share}")
    return lines
