"""The report's page: runs and their plots put into one self-contained HTML file."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from holdfast.config.describe import flat
from holdfast.metrics.matrix import LOWER_IS_BETTER, scale_of
from holdfast.records.growth import recorded_stages
from holdfast.records.read import FinishedRun, read_runs
from holdfast.report import plots
from holdfast.report.compare import compare
from holdfast.report.figures import COSTS, FIGURES, SHIFT, Figure, direction
from holdfast.report.html import render, score_cells
from holdfast.report.packed import pack_text
from holdfast.report.rows import Brief, RowList
from holdfast.report.tables import interval_notes
from holdfast.report.text import NOT_MEASURED, at_chance, learning, number
from holdfast.report.verdict import HEAD, decisions
from holdfast.system.files import json_text
from holdfast.system.output import write_output

TASKS = 12  # whose responses are shown in a run's section, at most: those that lost most


def write_report(paths: list[Path], output: Path) -> Path:
    """Write the report of one run, or the comparison of several, as one HTML file that needs nothing else.

    Args:
        paths: the directories of the runs; their order is the order of the page.
        output: where to write; the file appears whole or not at all.

    Returns:
        ``output``.

    Raises:
        RunDirectoryError: a directory holds no run, or none that was evaluated yet.
    """
    assert paths, "a report needs at least one run"
    runs = read_runs(paths)
    page, rows = _Page(), RowList()
    sections = [page.run(run, rows.add(run)) for run in runs]
    packed = rows.packed()
    context = {
        "title": f"{runs[0].label}: holdfast report"
        if len(runs) == 1
        else f"{len(runs)} runs compared: holdfast report",
        "runs": sections,
        "comparison": page.comparison(runs) if len(runs) > 1 else None,
        "rows": _test_rows(packed) if packed["chunks"] else None,
        "not_measured": NOT_MEASURED,
        "gate_head": HEAD,
    }
    html = render(
        "template.html.j2",
        scripts=("unpack.js", "rows.js", "page.js"),
        data={"plots": pack_text(json_text({"figures": page.plots, "templates": plots.templates()})), "rows": packed},
        **context,
    )
    write_output(output, html)
    return output


class _Page:
    """What the template shows, and the plots of the whole page by their identifiers."""

    def __init__(self) -> None:
        self.plots: dict[str, plots.Plot] = {}

    def plot(self, figure: plots.Plot, alt: str) -> dict[str, Any]:
        """Keep a plot for the page."""
        name = f"plot-{len(self.plots) + 1}"
        self.plots[name] = figure
        return {"id": name, "alt": alt, "width": figure.pop("min_width", 0), "height": figure["layout"]["height"]}

    def comparison(self, runs: list[FinishedRun]) -> dict[str, Any]:
        found = compare(runs)
        rows = found.rows
        points = [figure for figure in FIGURES if figure.key in ("average", "forgetting")]
        return {
            "rows": rows,
            "figures": [_figure(figure, runs[0]) for figure in (*found.figures, *COSTS)],
            "costs": {figure.key: figure for figure in COSTS},
            "baseline": found.baseline,
            "different": found.different,
            "notes": interval_notes(found),
            "headline": _comparison_headline(rows),
            "general": list(dict.fromkeys(name for row in rows for name in row["general"])),
            "points": [
                {"figure": _figure(figure, runs[0])}
                | self.plot(
                    plots.compare_points(rows, figure), f"The {figure.label} of every run, as in the table above"
                )
                for figure in points
            ],
            "costly": [
                self.plot(
                    plots.cost_points(rows, FIGURES[0], figure), f"Average of every run against its {figure.label}"
                )
                for figure in COSTS
                if all(row[figure.key] is not None for row in rows)
            ],
            "shifted": self.shifted(rows),
            "seen": self.plot(
                plots.seen_average_curves(runs),
                "Average over the tasks learned so far, by stage, one curve a run",
            ),
        }

    def shifted(self, rows: list[dict[str, Any]]) -> dict[str, Any] | None:
        """What was forgotten against how far the stages moved the model, where two rows have both."""
        known = [row for row in rows if row["shift"] is not None and row["forgetting"] is not None]
        if len(known) < 2:
            return None
        [forgetting] = [figure for figure in FIGURES if figure.key == "forgetting"]
        plot = plots.cost_points(known, forgetting, SHIFT)
        return self.plot(plot, "Forgetting of every run against how far its stages moved the model")

    def budget(self, run: FinishedRun) -> list[dict[str, Any]]:
        """What was lost of each budget, and the multipliers; nothing where the run has no budget."""
        if not any("keep" in event for event in run.events):
            return []
        alts = "What was lost of each budget over optimizer steps", "The multipliers over optimizer steps"
        return [self.plot(plot, alt) for plot, alt in zip(plots.budget_curves(run), alts, strict=True)]

    def run(self, run: FinishedRun, changed: list[Brief]) -> dict[str, Any]:
        tasks, general = run.tasks, run.matrix["general"]
        scales = _groups(list(range(len(tasks))), lambda j: scale_of(run.scorers[tasks[j]]))
        abilities = _groups(list(general), _scale)
        return {
            "label": run.label,
            "run": run,
            "headline": _headline(run),
            "summary": [
                {
                    "value": run.matrix["summary"].get(figure.key),
                    "ends": run.matrix["intervals"].get(figure.key),
                    "missing": run.matrix.get("missing", {}).get(figure.key),
                }
                | _figure(figure, run)
                for figure in FIGURES
                if figure.key in run.matrix["summary"]
            ],
            "mixed": len(scales) > 1,
            "scales": [
                {
                    "lower": run.lower_is_better(columns[0]),
                    "metrics": sorted({run.matrix["metrics"][tasks[j]] for j in columns}),
                    "heat_map": self.plot(
                        plots.heat_map(run, columns),
                        "Heat map of the score matrix; the table below it holds the same figures",
                    ),
                    "curves": self.plot(
                        plots.task_curves(run, columns),
                        "Score of each task over the stages; the table of the score matrix holds the same figures",
                    ),
                }
                for columns in scales
            ],
            "changes": _most_lost(changed),
            "changed": len(changed),
            "cells": score_cells(run),
            "general": [
                {
                    "lower": names[0].startswith(LOWER_IS_BETTER),
                    "curves": self.plot(
                        plots.general_curves(run, names),
                        "General ability over the stages; the table below holds the same figures",
                    ),
                }
                for names in abilities
            ],
            "gate": decisions(run.info),
            "learning": self.plot(
                plots.learning_curves(run),
                "Score of each task while its own stage trained, over the share of its steps",
            )
            if run.matrix.get("curves")
            else None,
            "losses": self.plot(plots.loss_curves(run), "Loss and its terms over optimizer steps")
            if run.events
            else None,
            "stages": _stages(run),
            "budget": self.budget(run),
            "config": flat({key: value for key, value in run.config.items() if key != "method"}),
            "environment": _environment(run),
        }


def _most_lost(changed: list[Brief]) -> list[Brief]:
    """The tasks that lost most rows, in their order."""
    kept = sorted(range(len(changed)), key=lambda i: -changed[i].lost)[:TASKS]
    return [changed[i] for i in sorted(kept)]


def _figure(figure: Figure, run: FinishedRun) -> dict[str, Any]:
    """A figure's name and definition, and which direction is good in this run."""
    return asdict(figure) | {"better": direction(figure, run.lower_is_better(0))}


def _test_rows(packed: dict[str, Any]) -> dict[str, Any]:
    """The list of test rows: what is packed, and how many changed by task and run."""
    counts: dict[str, dict[int, dict[str, Any]]] = {}
    for chunk in packed["chunks"]:
        counts.setdefault(chunk["task"], {}).update({run["run"]: run for run in chunk["runs"]})
    return {"packed": packed, "runs": packed["runs"], "length": packed["length"], "counts": counts}


def _groups(things: list[Any], key: Callable[[Any], Hashable]) -> list[list[Any]]:
    """Things with the same key together, in the order in which the keys first come."""
    groups: dict[Hashable, list[Any]] = {}
    for thing in things:
        groups.setdefault(key(thing), []).append(thing)
    return list(groups.values())


def _scale(name: str) -> str:
    """The scale of a measure of general ability."""
    return next((scale for scale in LOWER_IS_BETTER if name.startswith(scale)), "fraction")


def _headline(run: FinishedRun) -> list[str]:
    """What happened, in sentences."""
    summary, few = run.matrix["summary"], len(run.tasks)
    score = run.matrix["metrics"][run.tasks[0]] if run.lower_is_better(0) else "score"
    sentences = []
    if summary["average"] is not None:
        mean = f"mean {score} over {few} tasks" if few > 1 else score
        sentences.append(f"After the last stage the {mean} is {number(summary['average'])}.")
    note = learning(run.learned, run.one_row)
    if note is not None:
        sentences.insert(0, note)
    if summary["forgetting"] is not None and (note is None or any(run.learned.values())):
        forgetting = round(summary["forgetting"], 3)
        if forgetting > 0:
            sentences.append(f"An earlier task has lost {number(forgetting)} since its best, on average.")
        elif forgetting < 0:
            sentences.append(f"Nothing was forgotten: an earlier task has gained {number(-forgetting)}, on average.")
        else:
            sentences.append("Nothing was forgotten.")
    if summary["general_change"] is not None:
        sentences.append(f"General ability has changed by {number(summary['general_change'], signed=True)}.")
    if (note := at_chance(run.matrix)) is not None:
        sentences.append(note)
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


def _comparison_headline(rows: list[dict[str, Any]]) -> list[str]:
    """Which run is best, in sentences; nothing where none can be called so."""
    sentences = []
    for key, text in (("average", "The best average after the last stage"), ("forgetting", "The least forgetting")):
        best = [row for row in rows if key in row["best"]]
        if best:
            sentences.append(f"{text} is {number(best[0][key])} ({'; '.join(row['run'] for row in best)}).")
    references = [row for row in rows if row["reference"] and row["average"] is not None]
    if references:
        reached = "; ".join(f"{number(row['average'])} ({row['run']})" for row in references)
        sentences.append(f"For reference, the average is {reached}.")
    return sentences


def _stages(run: FinishedRun) -> list[dict[str, Any]]:
    """The stages that began: when, when their tasks were appended, and which settings differ from the first one's."""
    appended = {task: growth["at"] for growth in run.info.get("grown", []) for task in growth["tasks"]}
    found = []
    for stage, settings in zip(recorded_stages(run.path, run.info), run.stage_settings, strict=False):
        first = run.stage_settings[0]
        other = {key: value for key, value in settings.items() if value != first.get(key)}
        facts = {key: stage[key] for key in ("stage", "task", "started", "finished")}
        shift = run.shifts.get(stage["stage"])
        found.append(facts | {"appended": appended.get(stage["task"]), "settings": other, "shift": shift})
    return found


def _environment(run: FinishedRun) -> dict[str, str]:
    """Where and with what the run was made; what was not recorded is left out."""
    info = run.info
    hardware = info.get("hardware") or {}
    parameters = info.get("parameters") or {}
    seconds = info.get("seconds") or {}
    stream = info.get("stream")
    facts = {
        "stream": f"{stream['name']}, version {stream['version']}" if stream else None,
        "engine": info["engine"],
        "processor": f"{hardware['cpu']}, {hardware['cores']} cores" if hardware else None,
        "memory": f"{hardware['memory_gib']:.0f} GiB" if hardware else None,
        "GPUs": ", ".join(hardware["gpus"]) or "none" if hardware else None,
        "parameters": f"{parameters['total']:,}, of which {parameters['trainable']:,} trained" if parameters else None,
        "weights converted from": info.get("converted_from"),
        "commit": info.get("commit"),
        "started": info["started"],
        "finished": info.get("finished"),
        **{f"time to {what}": f"{value:,.0f} s" for what, value in seconds.items()},
        "tokens trained on": f"{info['tokens']:,}" if info.get("tokens") else None,
        "peak memory of training": f"{info['peak_memory_gib']:.2f} GiB" if info.get("peak_memory_gib") else None,
        **{f"{library} version": version for library, version in (info.get("versions") or {}).items()},
        **{
            f"other versions at {change['at']}": ", ".join(change["versions"])
            for change in info.get("changes", [])
            if "versions" in change
        },
    }
    return {name: fact for name, fact in facts.items() if fact is not None}
