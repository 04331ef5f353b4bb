"""The report's plots as plotly figures: plain dicts without colours, which the page's template gives by theme."""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from operator import itemgetter
from typing import Any

from holdfast.metrics.matrix import LOWER_IS_BETTER
from holdfast.records.read import FinishedRun
from holdfast.report.figures import Figure
from holdfast.report.text import number

Plot = dict[str, Any]
Value = Callable[[dict[str, Any]], float | None]
"""What a line of events.jsonl says of something; None where it says nothing."""

POINTS = 500  # of one curve, at most
LABEL = 20  # characters of a stage's name beside the heat map, at most
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "star", "triangle-down")
FRACTIONS = {"range": [-0.04, 1.04], "tickvals": [0, 0.2, 0.4, 0.6, 0.8, 1]}

# Low to high, in steps of lightness that hold for every kind of colour vision; high stands out from the page, and the
# text of the theme can be read on all of them.
SCALE_LIGHT = ["#fbf8e3", "#d5ecc4", "#97d5bd", "#5cbcc6", "#3f9fc8"]
SCALE_DARK = ["#1a2530", "#1c3a58", "#1a5279", "#166b8c", "#158080"]
# No two neighbours can be confused by any kind of colour vision; markers differ as well.
COLOURS_LIGHT = ["#0068a8", "#c24e00", "#00795b", "#a63a80", "#8a6a00", "#50545c", "#3d8fc6", "#7d2e12"]
COLOURS_DARK = ["#5fb4f0", "#f78f4a", "#3ecb9f", "#e791c6", "#e5c53a", "#b4bcc6", "#a5d8ff", "#d8a07e"]


def templates() -> dict[str, Plot]:
    """The two plotly templates, ``light`` and ``dark``; they carry every colour."""
    return {
        "light": _template(
            ink="#20262b",
            muted="#5b6670",
            line="#dde2e6",
            surface="#ffffff",
            outline="#c24e00",
            text="#14191d",
            dark=False,
        ),
        "dark": _template(
            ink="#e4e9ec",
            muted="#9ba7b0",
            line="#313b42",
            surface="#161d21",
            outline="#ff9d5c",
            text="#ffffff",
            dark=True,
        ),
    }


def heat_map(run: FinishedRun, columns: list[int]) -> Plot:
    """The score matrix: rows are stages, columns are tasks that share a scale; own stages are outlined.

    Where the scores of joint training are known beside the run's own they make a last row. ``min_width`` is the width
    in pixels below which the figures would run into each other. ``meta`` has the names of rows and columns, of which
    the page makes those of each cell.
    """
    rows = [[stage[j] for j in columns] for stage in run.scores]
    names = run.stage_names()
    if run.matrix["joint"] and not run.joint:
        rows.append([run.matrix["joint"][j] for j in columns])
        names.append("joint training")
    lower = run.lower_is_better(columns[0])
    trace: Plot = {
        "type": "heatmap",
        "z": rows,
        "texttemplate": "%{z:,.3f}" if all(abs(v) < 100 for row in rows for v in row if v is not None) else "%{z:,.1f}",
        "meta": {"rows": list(map(_plain, names)), "columns": [_plain(run.tasks[j]) for j in columns]},
        "hovertemplate": "%{customdata[1]}<br>%{customdata[0]}: %{z:.4f}<extra></extra>",
        "hoverongaps": False,
        "xgap": 5,
        "ygap": 5,
        "showscale": False,
        "reversescale": lower,
        **({} if lower else {"zmin": 0, "zmax": 1}),
    }
    missing = [
        {"x": i, "y": t, "text": "not<br>measured", "showarrow": False, "font": {"size": 10}}
        for t, row in enumerate(rows)
        for i, value in enumerate(row)
        if value is None
    ]
    own = [
        {"type": "rect", "x0": i - 0.5, "x1": i + 0.5, "y0": run.own_stage(j) - 0.5, "y1": run.own_stage(j) + 0.5}
        for i, j in enumerate(columns)
        if run.scores[run.own_stage(j)][j] is not None
    ]
    layout = {
        "height": 46 * len(rows) + 70,
        "xaxis": _names([run.tasks[j] for j in columns], 16) | {"side": "top", "autotickangles": [0, 30, 90]},
        "yaxis": _names(names, LABEL) | {"autorange": "reversed", "showgrid": False},
        "annotations": missing,
        "shapes": own,
        "hovermode": "closest",
        "margin": {"t": 8, "b": 8},
    }
    label = min(LABEL, max(len(name) for name in names))
    return {"data": [trace], "layout": layout, "min_width": 30 + 7 * label + 50 * len(columns)}


def task_curves(run: FinishedRun, columns: list[int]) -> Plot:
    """Each task's score over the stages; the large marker is the stage in which the task was learned."""
    series = [
        _curve(run.tasks[j], i, [stage[j] for stage in run.scores], large=run.own_stage(j))
        for i, j in enumerate(columns)
    ]
    return _over_stages(run, series, fractions=not run.lower_is_better(columns[0]))


def general_curves(run: FinishedRun, names: list[str]) -> Plot:
    """Measures of general ability that share a scale, over the stages; perplexities on a logarithmic one."""
    series = [_curve(name, i, run.matrix["general"][name]) for i, name in enumerate(names)]
    plot = _over_stages(run, series, fractions=not names[0].startswith(LOWER_IS_BETTER))
    if names[0].startswith("perplexity"):
        plot["layout"]["yaxis"] = {"type": "log", "dtick": 1}
    return plot


def learning_curves(run: FinishedRun) -> Plot:
    """Each task's score while its own stage trained, over the share of the stage's steps."""
    series = []
    for i, task in enumerate(task for task in run.tasks if task in run.matrix["curves"]):
        found = run.matrix["curves"][task]
        curve = _curve(f"{task}: area {number(found['area'])}", i, found["scores"])
        series.append(curve | {"x": [step / found["steps"][-1] for step in found["steps"]]})
    layout = {
        "height": 310 + 16 * len(series),
        "xaxis": {"title": {"text": "share of the stage's steps"}, "tickformat": ".0%", "range": [-0.02, 1.02]},
        "yaxis": {} if run.lower_is_better(0) else dict(FRACTIONS),
        "hovermode": "closest",
        "showlegend": True,
    }
    return {"data": series, "layout": layout}


def seen_average_curves(runs: list[FinishedRun]) -> Plot:
    """Average over the tasks learned so far, by stage, one curve a run."""
    series = [
        _curve(run.label, i, [None, *run.seen_average()], large=len(run.tasks) if run.joint else None)
        for i, run in enumerate(runs)
    ]
    plot = _over_stages(runs[0], series, fractions=not runs[0].lower_is_better(0))
    stages = max(len(run.tasks) for run in runs)
    plot["layout"]["xaxis"] = {
        "tickvals": list(range(1, stages + 1)),
        "range": [0.6, stages + 0.4],
        "title": {"text": "after stage"},
    }
    return plot


def compare_points(rows: list[dict[str, Any]], figure: Figure) -> Plot:
    """One summary figure of every run, with its 95 % interval; ``rows`` are those of `compare_table`."""
    series = []
    for i, row in enumerate(rows):
        value, ends = row[figure.key], row["intervals"].get(figure.key)
        low, high = ends or (value, value)
        series.append(
            {
                "type": "scatter",
                "name": _plain(row["run"]),
                "x": [low, value, high],
                "y": [i, i, i],
                "mode": "lines+markers",
                "cliponaxis": False,
                "marker": {
                    "symbol": ["line-ns-open", SYMBOLS[i % len(SYMBOLS)], "line-ns-open"],
                    "size": [10, 12, 10] if ends else [0, 12, 0],
                    "opacity": 1,
                },
                "hovertemplate": "%{fullData.name}: %{x:.4f}<extra></extra>",
                "showlegend": False,
            }
        )
    missing = [
        {"xref": "paper", "x": 0, "xanchor": "left", "y": i, "text": "not measured", "showarrow": False}
        for i, row in enumerate(rows)
        if row[figure.key] is None
    ]
    layout = {
        "height": 34 * len(rows) + 80,
        "xaxis": {"zeroline": True, "rangemode": "tozero"},
        "yaxis": _names([row["run"] for row in rows], 26) | {"range": [len(rows) - 0.4, -0.6], "showgrid": True},
        "annotations": missing,
        "hovermode": "closest",
    }
    return {"data": series, "layout": layout}


def cost_points(rows: list[dict[str, Any]], figure: Figure, cost: Figure) -> Plot:
    """A figure of every row against what it cost, with the figure's 95 % interval; up and to the left is better."""
    series = []
    for i, row in enumerate(rows):
        value, ends = row[figure.key], row["intervals"].get(figure.key)
        bars = {}
        if value is not None and ends:
            above, below = max(0, ends[1] - value), max(0, value - ends[0])
            bars = {"error_y": {"type": "data", "symmetric": False, "array": [above], "arrayminus": [below]}}
        series.append(
            {
                "type": "scatter",
                "name": _short(row["run"], 26),
                "x": [row[cost.key]],
                "y": [value],
                "mode": "markers",
                "cliponaxis": False,
                "marker": {"symbol": SYMBOLS[i % len(SYMBOLS)], "size": 12, "opacity": 1},
                "hovertemplate": f"{cost.label} %{{x:,.4~g}}<br>{figure.label} %{{y:.4f}}",
            }
            | bars
        )
    layout = {
        "height": 280 + 16 * len(rows),
        "xaxis": {"title": {"text": cost.label}, "rangemode": "tozero", "showgrid": True},
        "yaxis": {"title": {"text": figure.label}},
        "hovermode": "closest",
        "showlegend": True,
    }
    return {"data": series, "layout": layout}


def loss_curves(events: Sequence[dict[str, Any]]) -> Plot:
    """The loss and every named term of it over optimizer steps; stages stand side by side.

    Args:
        events: the lines of events.jsonl, or some of them, in order.
    """
    terms = list(dict.fromkeys(term for event in events for term in event["terms"]))
    values: dict[str, Value] = {"loss": itemgetter("loss")} if len(terms) > 1 else {}
    return _over_steps(events, values | {f"{term} term": _below("terms", term) for term in terms})


def budget_curves(run: FinishedRun) -> list[Plot]:
    """What was lost of each budget, as a multiple of it, and the multipliers, over optimizer steps.

    ``keep`` of an event has both; there is none before a stage's first measurement.
    """
    titles = list(dict.fromkeys(title for event in run.events for title in event.get("keep", {})))
    lost = _over_steps(
        run.events, {f"{t}: lost / budget": _below("keep", t, lambda v: v["lost"] / v["budget"]) for t in titles}
    )
    shown = [y for line in lost["data"] for y in line["y"] if y is not None]
    lost["layout"]["yaxis"] = {"range": [min([-0.1, *shown]), min(max([1.2, *shown]), 4)]}
    lost["layout"]["shapes"] = [{"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": 1, "y1": 1}]
    multiplier = itemgetter("multiplier")
    return [lost, _over_steps(run.events, {f"{t}: multiplier": _below("keep", t, multiplier) for t in titles})]


def _below(key: str, name: str, read: Callable[[Any], float] = float) -> Value:
    """What an event has below a key under a name, as a number."""

    def value(event: dict[str, Any]) -> float | None:
        found = event.get(key, {}).get(name)
        return None if found is None else read(found)

    return value


def _over_steps(events: Sequence[dict[str, Any]], values: Mapping[str, Value]) -> Plot:
    """Values of the events, by name, over optimizer steps; stages stand side by side, and the first line is thicker."""
    of_stage: dict[int, list[dict[str, Any]]] = {}
    for event in events:
        of_stage.setdefault(event["stage"], []).append(event)
    stages = sorted(of_stage)
    length = {stage: max(event["step"] for event in of_stage[stage]) for stage in stages}
    start = dict(zip(stages, accumulate([length[stage] for stage in stages[:-1]], initial=0), strict=False))
    series: list[Plot] = []
    for name, value in values.items():
        x: list[float | None] = []
        y: list[float | None] = []
        where: list[str | None] = []
        for stage in stages:
            points = [(event, v) for event in of_stage[stage] if (v := value(event)) is not None]
            kept = thin(points, POINTS // len(stages) - 1)
            x += [start[stage] + event["step"] for event, _ in kept] + [None]
            y += [v for _, v in kept] + [None]
            where += [f"stage {stage} ({_plain(event['task'])}), step {event['step']}" for event, _ in kept] + [None]
        series.append(
            {
                "type": "scatter",
                "name": _plain(name),
                "x": x,
                "y": y,
                "customdata": where,
                "mode": "lines",
                "line": {"width": 1.5 if series else 2.5, "dash": _dash(len(series))},
                "hovertemplate": "%{fullData.name} %{y:.4f}<br>%{customdata}<extra></extra>",
            }
        )
    tasks = {stage: found[0]["task"] for stage, found in of_stage.items()}
    layout = {
        "height": 340,
        "xaxis": {
            "tickvals": [start[stage] + length[stage] / 2 for stage in stages],
            "ticktext": [f"{_short(tasks[stage], 12)}<br>{length[stage]:,} steps" for stage in stages],
            "ticklabeloverflow": "allow",
            "range": [0, sum(length.values())],
            "minor": {"tickvals": [start[stage] for stage in stages[1:]], "showgrid": True},
        },
        "yaxis": {"rangemode": "tozero"},
        "showlegend": True,
        "hovermode": "closest",
    }
    return {"data": series, "layout": layout}


def thin(points: Sequence[tuple[Any, float]], limit: int) -> list[tuple[Any, float]]:
    """At most ``limit`` of the (thing, value) points: of each group of neighbours the lowest and the highest, in order.

    Peaks stay, which means or every n-th point would lose.
    """
    groups = limit // 2
    if len(points) <= limit:
        return list(points)
    kept: set[int] = set()
    for g in range(groups):
        members = range(g * len(points) // groups, (g + 1) * len(points) // groups)
        kept |= {min(members, key=lambda i: points[i][1]), max(members, key=lambda i: points[i][1])}
    return [points[i] for i in sorted(kept)]


def _over_stages(run: FinishedRun, series: list[Plot], fractions: bool) -> Plot:
    names = ["before", *(name.removeprefix("after ") for name in run.stage_names()[1:])]
    layout = {
        "height": 310 + 16 * len(series),
        "xaxis": _names(names, 12) | {"title": {"text": "after stage"}, "range": [-0.4, len(names) - 0.6]},
        "yaxis": dict(FRACTIONS) if fractions else {},
        "hovermode": "x unified",
        "showlegend": True,
    }
    return {"data": series, "layout": layout}


def _curve(name: str, i: int, y: list[float | None], large: int | None = None) -> Plot:
    return {
        "type": "scatter",
        "name": _short(name, 32),
        "x": list(range(len(y))),
        "y": y,
        "mode": "lines+markers",
        "cliponaxis": False,
        "line": {"width": 2, "dash": _dash(i // len(COLOURS_LIGHT))},
        "marker": {
            "symbol": SYMBOLS[i % len(SYMBOLS)],
            "opacity": 1,
            "size": [15 if t == large else 9 for t in range(len(y))],
        },
        "hovertemplate": "%{y:.4f}",
    }


def _dash(i: int) -> str:
    return ("solid", "dot", "dash", "dashdot")[i % 4]


def _names(names: list[str], length: int) -> Plot:
    """An axis whose ticks 0, 1, ... are names; two equal names stay two places."""
    return {
        "tickvals": list(range(len(names))),
        "ticktext": [_short(name, length) for name in names],
        "zeroline": False,
        "ticks": "",
        "ticklabelstandoff": 6,
        "ticklabeloverflow": "allow",
    }


def _short(name: str, length: int) -> str:
    return _plain(name if len(name) <= length else name[: length - 1] + "…")


def _plain(text: str) -> str:
    """plotly reads some HTML in its texts; this text is shown as it is."""
    return html.escape(text, quote=False)


def _template(*, ink: str, muted: str, line: str, surface: str, outline: str, text: str, dark: bool) -> Plot:
    scale = SCALE_DARK if dark else SCALE_LIGHT
    colourscale = [[i / (len(scale) - 1), colour] for i, colour in enumerate(scale)]
    axis = {
        "gridcolor": line,
        "linecolor": line,
        "zerolinecolor": muted,
        "fixedrange": True,
        "title": {"standoff": 12, "font": {"color": muted, "size": 12}},
    }
    return {
        "data": {
            "heatmap": [{"colorscale": colourscale, "textfont": {"color": text, "size": 13}}],
            "scatter": [{"marker": {"line": {"color": surface, "width": 1}}}],
        },
        "layout": {
            "colorway": COLOURS_DARK if dark else COLOURS_LIGHT,
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
            "font": {"color": ink, "size": 12, "family": "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif"},
            "xaxis": axis
            | {
                "showgrid": False,
                "automargin": "height",
                "autotickangles": [0, -30, -90],
                "minor": {"gridcolor": muted, "griddash": "dot"},
            },
            "yaxis": axis | {"automargin": "width"},
            "hoverlabel": {"bgcolor": surface, "bordercolor": muted, "font": {"color": ink}, "namelength": -1},
            "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
            "annotationdefaults": {"font": {"color": muted}},
            "shapedefaults": {"line": {"color": outline, "width": 2.5}},
            "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": muted, "activecolor": ink},
            "margin": {"l": 8, "r": 12, "t": 8, "b": 8},
            "dragmode": False,
        },
    }
