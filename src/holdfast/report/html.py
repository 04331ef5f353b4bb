"""A page as one HTML file that needs nothing else: template, style, scripts, data and the plotting library."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from holdfast.records.read import FinishedRun
from holdfast.report.packed import packed_plotly
from holdfast.report.tables import cost, p_value
from holdfast.report.text import interval, number, shorten, visible
from holdfast.system.files import json_text

HERE = Path(__file__).parent


def render(template: str, *, scripts: Sequence[str], **context: Any) -> str:
    """The page's HTML.

    Args:
        template: the name of a template in this folder.
        scripts: the names of the page's scripts in this folder, in their order.
        **context: what the template shows.
    """
    return (
        _environment()
        .get_template(template)
        .render(
            **context,
            css=(HERE / "page.css").read_text(encoding="utf-8"),
            script="".join((HERE / name).read_text(encoding="utf-8") for name in scripts),
            plotly=packed_plotly(),
        )
    )


def render_part(template: str, **context: Any) -> str:
    """A part of a page, without its style, scripts and data."""
    return _environment().get_template(template).render(**context)


def score_cells(run: FinishedRun) -> list[Markup]:
    """The cells of each row of the score matrix; of many tasks there are more than a template fills in good time."""
    rows, own = [], [run.own_stage(j) for j in range(len(run.tasks))]
    for t, scores in enumerate(run.scores):
        pairs = zip(scores, own, strict=True)
        kinds = [" class=none" if score is None else " class=own" if stage == t else "" for score, stage in pairs]
        cells = (f"<td{kind}>{number(score)}</td>" for kind, score in zip(kinds, scores, strict=True))
        rows.append(Markup("".join(cells)))
    return rows


@cache
def _environment() -> Environment:
    """One for all pages: it compiles a template once, which takes longer than to fill it."""
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "number": number,
        "short": lambda text: text.rstrip("0").rstrip(".") if "." in text else text,
        "interval": interval,
        "shorten": shorten,
        "visible": visible,
        "json": json_text,
        "cost": cost,
        "p_value": p_value,
    }
    return environment
