"""The report's page: runs and their plots put into one self-contained HTML file."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from holdfast.metrics.matrix import LOWER_IS_BETTER, scale_of
from holdfast.records.gate import is_accuracy
from holdfast.records.growth import recorded_stages
from holdfast.records.read import FinishedRun, read_runs
from holdfast.report import cite, plots
from holdfast.report.compare import compare
from holdfast.report.falls import comparison_pictures, run_pictures
from holdfast.report.figures import COSTS, FIGURES, SHIFT, Figure, direction
from holdfast.report.headline import comparison_headline, run_headline
from holdfast.report.html import render, score_cells
from holdfast.report.packed import pack_text
from holdfast.report.rows import Brief, RowList
from holdfast.report.tables import has_intervals, interval_notes
from holdfast.report.text import NOT_MEASURED
from holdfast.report.verdict import HEAD, decisions
from holdfast.system.files import json_text
from holdfast.system.output import write_output

LOSSES = 12  # tasks and abilities whose lost answers a run's section shows, at most: those that lost most


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
    page, rows = Page(), RowList()
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
        "bibtex": cite.bibtex(),
    }
    html = render(
        "template.html.j2",
        scripts=("unpack.js", "rows.js", "copy.js", "page.js"),
        data={"plots": pack_text(json_text({"figures": page.plots, "templates": plots.templates()})), "rows": packed},
        **context,
    )
    write_output(output, html)
    return output


class Page:
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
            "figures": [_figure(figure, runs[0]) for figure in found.figures],
            "costs": [_figure(figure, runs[0]) for figure in COSTS if any(row[figure.key] is not None for row in rows)],
            "baseline": found.baseline,
            "ranked": any(row["rank"] for row in rows),
            "paired": any(row["difference"] for row in rows),
            "different": found.different,
            "notes": interval_notes(found),
            "seeds": any(len(row["seeds"]) > 1 for row in rows),
            "has_intervals": any(has_intervals(row, found) for row in rows),
            "headline": comparison_headline(found, len(runs[0].tasks), {*runs[0].matrix["metrics"].values()}),
            "pictures": comparison_pictures(rows, found.lower),
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
        abilities = _groups(list(general), _scale)
        return {
            "label": run.label,
            "run": run,
            "headline": run_headline(run),
            "pictures": run_pictures(run, scales(run)),
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
            "mixed": len(scales(run)) > 1,
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
                for columns in scales(run)
            ],
            "lost": None if run.untrained else _lost(run, changed),
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
            "losses": self.plot(plots.loss_curves(run.events), "Loss and its terms over optimizer steps")
            if run.events
            else None,
            "stages": _stages(run),
            "budget": self.budget(run),
            "environment": _environment(run),
            "yaml": cite.configuration(run),
        }


def scales(run: FinishedRun) -> list[list[int]]:
    """The numbers of the tasks that share a scale, together."""
    return _groups(list(range(len(run.tasks))), lambda j: scale_of(run.scorers[run.tasks[j]]))


def _lost(run: FinishedRun, told: list[Brief]) -> dict[str, Any]:
    """What a run lost, for people: the tasks and abilities that lost answers, the biggest fall first, how many answers
    there are in all, and of what nothing can be shown."""
    since = [one for one in told if one.own]
    fallen = sorted((one for one in since if one.lost), key=lambda one: (-one.fall, -one.lost))
    names = {one.name for one in told}
    losses = [task for j, task in enumerate(run.tasks) if run.lower_is_better(j) and task not in names]
    losses += [name for name in run.matrix["general"] if not is_accuracy(name)]
    last = max((t for t, row in enumerate(run.scores) if any(score is not None for score in row)), default=0)
    return {
        "groups": fallen[:LOSSES],
        "left_out": fallen[LOSSES:],
        "kept": [one.name for one in since if not one.lost],
        "last": [one.name for one in told if not one.own and run.own_stage(run.tasks.index(one.name)) <= last],
        "losses": losses,
        "unknown": [name for name in [*run.tasks, *run.matrix["general"]] if name not in names.union(losses)],
        "right": sum(one.right for one in since),
        "lost": sum(one.lost for one in since),
        "gained": sum(one.gained for one in since),
    }


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
