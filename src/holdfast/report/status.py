"""Where a run stands: its stages, what each learned and what it cost, and what can be done next."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from holdfast.metrics.intervals import paired_difference
from holdfast.metrics.matrix import scale_of
from holdfast.records.directory import LEARN, current_stage, file_name, learned_stages, require_runs
from holdfast.records.gate import general_loss, is_accuracy, is_general_loss
from holdfast.records.read import FinishedRun, read_run
from holdfast.records.shapes import read_json, read_jsonl
from holdfast.records.stages import complete_stages, is_settled, named
from holdfast.report.text import ONE_ROW, interval, number
from holdfast.report.verdict import decisions
from holdfast.scoring.score import task_score
from holdfast.system.terminal import open_console, say

if TYPE_CHECKING:
    from rich.console import Console


def status(run: Path | str) -> dict[str, Any]:
    """Where a run stands, as plain values.

    Returns:
        ``run`` (its directory), ``model``, ``method``, ``tuner``, ``seed``, ``started``, ``finished`` (None: not yet),
        ``current`` (the stage whose weights it holds; 0 is before training), ``next`` (commands, each with what it is
        for) and ``stages``, in order, each with

        - ``stage``, ``task`` and ``state``: current, kept (the current weights come from it, too), undone, training
          or waiting; ``step``, while it trains;
        - ``learned``: what its task gained in it, positive is better; its 95 % ``interval`` over test examples; and
          ``is_learned``, whether that is more than chance, which one test row never is: ``test_rows``;
        - ``forgetting``: the mean fall of the tasks that were learned before, in this stage alone; positive is worse.
          It is None where their metrics have no common scale, and ``forgetting_by_scale`` has the mean of each:
          ``fraction`` (such as accuracy), or a loss's name;
        - ``general_change``: the mean change of the accuracy-like general abilities, negative is worse; and
          ``general_loss``: the mean rise of the losses on general text as a share, positive is worse;
        - ``seconds``, of training and measuring; ``gate``, what it decided; and ``keep``, whether the stage kept its
          budget and each of its constraints, as stage.json has it; None: it had none.

        What was not measured is None.

    Raises:
        RunDirectoryError: there is no run, it was not measured yet, is one of the laboratory, or is damaged.
    """
    path = Path(run)
    require_runs([path])
    found = read_run(path)
    done = complete_stages(found)
    current = current_stage(found.info, done[-1])
    model, tuner = (found.config.get(key) or {} for key in ("model", "tuner"))
    return {
        "run": str(path),
        "model": model.get("name"),
        "method": found.method,
        "tuner": tuner.get("name"),
        "seed": found.info["seed"],
        "started": found.info["started"],
        "finished": found.info.get("finished"),
        "current": current,
        "stages": _Stages(found, done).all(),
        "next": _next(found, done, current),
    }


class _Stages:
    """The stages of a run, each measured by its own weights, also where the run went back from it."""

    def __init__(self, run: FinishedRun, done: list[int]):
        self.run, self.done = run, done
        self.gate = {decision["stage"]: decision["what"] for decision in decisions(run.info)}
        scores = {t: self._scores(t) for t in done}
        rows = [scores.get(t, [None] * len(run.tasks)) for t in range(max(len(run.scores), done[-1] + 1))]
        bare = {key: value for key, value in run.info.items() if key not in ("gate", "rollbacks")}
        self.own = replace(run, info=bare, matrix=run.matrix | {"scores": rows}, _statistics={})

    def all(self) -> list[dict[str, Any]]:
        if self.run.untrained:
            return []
        names = ["joint"] if self.run.joint else list(self.run.info["tasks"])  # also those that are not measured yet
        return [self.stage(t, name) for t, name in enumerate(names, start=1)]

    def stage(self, t: int, name: str) -> dict[str, Any]:
        kept = learned_stages(self.run.info, self.done[-1])
        found: dict[str, Any] = {"stage": t, "task": name, "state": "waiting"}
        events = [event["step"] for event in self.run.events if event["stage"] == t]
        if t in self.done:
            found["state"] = "current" if [t] == kept[-1:] else "kept" if t in kept else "undone"
        elif events:
            found |= {"state": "training", "step": events[-1]}
        known = self.run.joint or t <= len(self.run.tasks)
        measured = known and t in self.done and (self.run.folders[t] / "evaluation.json").exists()
        decided = {"gate": self.gate.get(t), "keep": self._keep(t)}
        return found | self._learned(t, measured) | self._cost(t, measured) | decided

    def _learned(self, t: int, measured: bool) -> dict[str, Any]:
        gain, ends = self._gain(t) if measured and not self.run.joint else (None, None)
        if measured and self.run.joint:
            gains = self._mean_changes(0, t, range(len(self.run.tasks)))
            gain = next(iter(gains.values())) if len(gains) == 1 else None
        rows = None if self.run.joint or not measured else self.run.info["tasks"][self.run.tasks[t - 1]]["test"]
        sure = None if gain is None else rows != 1 and (ends[0] if ends else gain) > 0
        return {"learned": gain, "interval": ends, "is_learned": sure, "test_rows": rows}

    def _gain(self, t: int) -> tuple[float | None, list[float] | None]:
        """What the stage's task gained, and its interval."""
        j, before, own = t - 1, current_stage(self.run.info, t - 1), self.own
        gain = self._change(before, t, j)
        earlier, later = (own.statistics(row, j) for row in (before, t))
        if gain is None or earlier is None or later is None or earlier.shape != later.shape:
            return gain, None
        sign = -1 if own.lower_is_better(j) else 1
        totals = [own.totals[j]]
        ends = paired_difference([earlier], [later], totals=totals, resamples=1000, permutations=1)["interval"]
        return gain, ends and sorted(sign * end for end in ends)

    def _cost(self, t: int, measured: bool) -> dict[str, Any]:
        keys = ("forgetting", "forgetting_by_scale", "general_change", "general_loss", "seconds")
        if not measured:
            return dict.fromkeys(keys)
        before = current_stage(self.run.info, t - 1)
        past = [] if self.run.joint else [s - 1 for s in learned_stages(self.run.info, t - 1)]
        fallen = {scale: -change for scale, change in self._mean_changes(before, t, past).items()}
        fall = next(iter(fallen.values())) if len(fallen) == 1 else None
        first, last = self._general(before), self._general(t)
        moved = [after - first[name] for name, after in last.items() if is_accuracy(name) and name in first]
        losses = [
            (general_loss(name, after), general_loss(name, first[name]))
            for name, after in last.items()
            if is_general_loss(name) and name in first
        ]
        rises = [(after - start) / start for after, start in losses if start]
        folder = self.run.folders[t]
        seconds = sum(read_json(folder / name)["seconds"] for name in ("stage.json", "evaluation.json"))
        return dict(zip(keys, (fall, fallen, _mean(moved), _mean(rises), seconds), strict=True))

    def _keep(self, t: int) -> dict[str, Any] | None:
        """The verdict on a stage's budget."""
        return read_json(self.run.folders[t] / "stage.json").get("keep") if t in self.done and t else None

    def _scores(self, t: int) -> list[float | None]:
        """The scores of a stage's own weights, by task."""
        run = self.run
        row = len(run.tasks) if run.joint and t else t
        if row < len(run.scores) and run.stage_of(row) == t:
            return run.scores[row]
        scores: list[float | None] = []
        for task in run.tasks:
            file = run.folders[t] / "responses" / f"{file_name(task, run.tasks)}.jsonl"
            scores.append(task_score(read_jsonl(file), run.matrix["metrics"][task]) if file.exists() else None)
        return scores

    def _general(self, t: int) -> dict[str, float]:
        """The general abilities of a stage's own weights that were measured."""
        file = self.run.folders[t] / "evaluation.json" if t in self.run.folders else None
        found = read_json(file)["general"] if file is not None and file.exists() else {}
        return {name: value for name, value in found.items() if value is not None}

    def _change(self, before: int, after: int, j: int) -> float | None:
        """How much better task j became from one stage to another."""
        first, second = (self.own.scores[t][j] for t in (before, after))
        if first is None or second is None:
            return None
        return first - second if self.own.lower_is_better(j) else second - first

    def _mean_changes(self, before: int, after: int, tasks: Iterable[int]) -> dict[str, float]:
        """How much better the tasks became in the mean, by the scale of their metrics; empty if one is not known."""
        changes: dict[str, list[float]] = {}
        for j in tasks:
            if (change := self._change(before, after, j)) is None:
                return {}
            changes.setdefault(scale_of(self.own.scorers[self.own.tasks[j]]), []).append(change)
        return {scale: sum(found) / len(found) for scale, found in changes.items()}


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _next(run: FinishedRun, done: list[int], current: int) -> list[dict[str, str]]:
    """What can be done now."""
    path = shlex.quote(str(run.path))
    if run.untrained:
        return [{"command": f"holdfast report {path}", "what": "write its page again"}]
    found = _going_on(run, path)
    if current:
        found.append({"command": f"holdfast export {path} --to FOLDER", "what": f"write {named(run, current)} out"})
    found.append({"command": f"holdfast serve {path} --follow", "what": "serve the current stage, also the next ones"})
    others = [t for t in done if t != current]
    if others and is_settled(run, done[-1]):
        kept = [t for t in (0, *learned_stages(run.info, done[-1])) if t != current]
        to = kept[-1] if kept else others[-1]
        found.append({"command": f"holdfast rollback {path} --to {to}", "what": f"hold {named(run, to)} again"})
    return found


def _going_on(run: FinishedRun, path: str) -> list[dict[str, str]]:
    """The commands by which a run goes on, or grows if it is finished: learn's, once learn has taken it over."""
    learn, again = f"holdfast learn DATA --into {path}", f"holdfast run CONFIG (output={path})"
    if (run.path / LEARN).exists():
        return [{"command": learn, "what": "teach it the next data" if run.finished else "go on; the data as before"}]
    if not run.finished:
        return [{"command": again, "what": "go on; the command that began it"}]
    stream, found = run.config["stream"], []
    if run.joint:
        return []
    if stream.get("name") is None or isinstance(stream.get("order"), list):
        found.append({"command": again, "what": "learn a task that you append to the stream of CONFIG"})
    if stream.get("name") is None:
        found.append({"command": learn, "what": "or let learn take it over; CONFIG cannot continue it then"})
    return found


# --- shown ---


def show(found: dict[str, Any], console: Console | None = None) -> None:
    """Print what :func:`status` gives: a table of 80 columns in a terminal, lines elsewhere."""
    console = console or open_console(highlight=False)

    def print_line(text: str) -> None:
        if console.is_terminal:
            console.print(text, soft_wrap=True)  # a command stays on one line, so that it can be copied
        else:
            say(text)

    print_line(_title(found))
    if console.is_terminal and found["stages"]:
        _print_table(found["stages"], console)
    for stage in [] if console.is_terminal else found["stages"]:
        cells = [f"{name} {cell}" if name else cell for name, cell in _cells(stage).items() if cell]
        say("  ".join([f"stage {stage['stage']}", stage["task"], *cells]))
    for line in found["next"]:
        print_line(f"{line['command']}  # {line['what']}")
    page = Path(found["run"], "report.html")
    if page.exists():
        print_line(f"{page}  # its page")


def _title(found: dict[str, Any]) -> str:
    held = next((f"stage {s['stage']} ({s['task']})" for s in found["stages"] if s["state"] == "current"), None)
    ended = f"finished {found['finished']}" if found["finished"] else "not finished"
    parts = [f"{found['model']}", found["method"], found["tuner"], f"seed {found['seed']}", ended]
    holds = held or "the model before training"
    return f"{found['run']}: holds {holds}\n{', '.join(part for part in parts if part)}"


def _cells(stage: dict[str, Any]) -> dict[str, str]:
    """What is shown of a stage, by its name; empty where it was not measured."""
    learned = number(stage["learned"], signed=True) if stage["learned"] is not None else ""
    if stage["interval"]:
        learned += f" ({interval(stage['interval'], signed=True)})"
    if stage["is_learned"] is False:
        learned += f", {ONE_ROW}" if stage["test_rows"] == 1 else " not learned"
    loss, seconds = stage["general_loss"], stage["seconds"]
    return {
        "": stage["state"] + (f", step {stage['step']}" if "step" in stage else ""),
        "learned": learned,
        "forgetting": ", ".join(
            number(fall, signed=True) + (f" {scale}" if stage["forgetting"] is None else "")
            for scale, fall in (stage["forgetting_by_scale"] or {}).items()
        ),
        "general": "" if stage["general_change"] is None else number(stage["general_change"], signed=True),
        "general loss": "" if loss is None else f"{'−' if loss < 0 else '+'}{abs(100 * loss):.1f} %",
        "minutes": "" if seconds is None else f"{seconds / 60:.1f}",
        "gate": stage["gate"] or "",
        "budget": _budget(stage["keep"]),
    }


def _budget(verdict: dict[str, Any] | None) -> str:
    """Whether a stage kept its budget; empty where it had none, or nothing to keep."""
    if not verdict or not verdict["constraints"]:
        return ""
    lost = [
        f"{one['task'] or 'general'} lost {number(one['lost'])} of {number(one['budget'])}"
        for one in verdict["constraints"]
        if not one["kept"]
    ]
    return f"not kept: {', '.join(lost)}" if lost else "kept"


def _print_table(stages: list[dict[str, Any]], console: Console) -> None:
    from holdfast.report.terminal import narrow_table

    table = narrow_table("stage")
    rows = [_cells(stage) for stage in stages]
    for stage, cells in zip(stages, rows, strict=True):
        if stage["interval"]:
            low, high = (f"{end:.2f}" for end in stage["interval"])
            mark = "\nnot learned" if stage["is_learned"] is False else ""
            cells["learned"] = f"{number(stage['learned'], signed=True)}\n{low}..{high}{mark}"
        cells["learned"] = cells["learned"].replace(f", {ONE_ROW}", "\none test row\nsays nothing")
    shown = [name for name in rows[0] if any(cells[name] for cells in rows)]
    for name in shown:
        numeric = name not in ("", "gate", "budget")
        heading = name.replace(" ", "\n")
        table.add_column(heading, justify="right" if numeric else "left", overflow="fold", no_wrap=numeric)
    for stage, cells in zip(stages, rows, strict=True):
        style = "bold" if stage["state"] == "current" else "dim" if stage["state"] in ("undone", "waiting") else None
        cells["forgetting"] = cells["forgetting"].replace(", ", "\n")
        table.add_row(f"{stage['stage']} {stage['task']}", *(cells[name] or "–" for name in shown), style=style)
    console.print(table)
