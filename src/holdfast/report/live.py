"""The page of a run that is at work: what is new is put into the page that is open."""

from __future__ import annotations

import time
from typing import Any

from holdfast.records.pulse import Beat
from holdfast.report import plots
from holdfast.report.falls import run_pictures
from holdfast.report.headline import run_headline
from holdfast.report.html import render, render_part
from holdfast.report.packed import pack_text
from holdfast.report.page import Page, scales
from holdfast.report.text import number
from holdfast.system.files import json_text
from holdfast.system.progress import clock

QUIET = 600.0
"""Seconds without any news after which a page says so, where nobody can tell whether the run is at work."""


def live_page(beat: Beat, trouble: str = "") -> str:
    """The whole page, which asks for the next state by itself."""
    state = live_state(beat, trouble)
    packed = pack_text(json_text({"figures": state["figures"], "templates": plots.templates()}))
    scripts = ("unpack.js", "page.js", "live.js")
    context = {"title": state["title"], "part": state["html"], "data": {"plots": packed}}
    return render("live.html.j2", scripts=scripts, **context)


def live_state(beat: Beat, trouble: str = "") -> dict[str, Any]:
    """What changes while a run is at work: ``title``, ``html`` and the ``figures`` of its plots.

    Args:
        trouble: why the files could not be read this time; empty where they were.
    """
    page, run = Page(), beat.run
    losses: dict[str, Any] | None = None
    maps: list[dict[str, Any]] = []
    if beat.events:
        losses = page.plot(plots.loss_curves(beat.events), "Loss and its terms over optimizer steps")
    if run is not None:
        maps = [page.plot(plots.heat_map(run, columns), "Heat map of the score matrix") for columns in scales(run)]
    title, what = _state(beat)
    html = render_part(
        "live_state.html.j2",
        beat=beat,
        title=title,
        what=what,
        trouble=trouble,
        progress=_progress(beat),
        loss=next((number(event["loss"]) for event in reversed(beat.events)), None),
        losses=losses,
        headline=[] if run is None else run_headline(run),
        pictures=[] if run is None else run_pictures(run, scales(run)),
        maps=maps,
        whole=beat.finished and (beat.path / "report.html").is_file(),
    )
    return {"title": f"{title}: {beat.path.resolve().name}", "html": html, "figures": page.plots}


def _state(beat: Beat) -> tuple[str, str]:
    """How the run is doing, in a word or two, and what that means."""
    if beat.record is None:
        return "Waiting", "The run has not begun yet: its data are read and its model is checked."
    if beat.finished:
        return "Finished", f"All {len(beat.tasks)} stages are trained and measured, since {beat.record['finished']}."
    gate = beat.record.get("gate", [])
    if beat.at_work is False and gate and not gate[-1]["passed"] and gate[-1]["action"] == "stop":
        return "Stopped by its gate", f"Stage {gate[-1]['stage']} failed a limit; the run's own page says which."
    if beat.at_work is False:
        return "Stopped", (
            "No process on this machine is at work on it: it was stopped or killed, or runs elsewhere. "
            "The command that began it continues it."
        )
    if beat.at_work is None and time.time() - beat.changed > QUIET:
        return "No news", f"Nothing was written for {clock(time.time() - beat.changed)}."
    if beat.stage is not None:
        return f"Stage {beat.stage} of {len(beat.tasks)}", f"It trains on {beat.tasks[beat.stage - 1]}."
    if beat.run is None:
        return "Before training", "The model is measured before training."
    return "Measuring", "The model is measured after a stage, or prepared for the next one."


def _progress(beat: Beat) -> dict[str, Any] | None:
    """How far the stage and the run are; None while nothing trains."""
    if beat.record is None or beat.stage is None or beat.finished:
        return None
    planned = beat.steps
    done = beat.step + sum(planned[: beat.stage - 1]) if planned else None
    stage, whole = beat.left if beat.at_work is not False else (None, None)
    return {
        "step": beat.step,
        "steps": planned[beat.stage - 1] if planned else None,
        "done": done,
        "all": sum(planned) if planned else None,
        "stage_left": None if stage is None else clock(stage),
        "run_left": None if whole is None else clock(whole),
    }
