"""`holdfast methods`, `tuners` and `streams`: what there is, and the options of one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from holdfast.cli.company import refuse
from holdfast.system.terminal import say

if TYPE_CHECKING:
    from holdfast.api.declared import Page
    from holdfast.data.streams.definition import Definition

Name = Annotated[str | None, typer.Argument(help="Show this one in full.", show_default=False)]


def methods(name: Name = None) -> None:
    """List the methods against forgetting."""
    from holdfast.methods import METHODS, page

    if name is None:
        _show_names(METHODS.pages())
    else:
        _show_page(page(name))


def tuners(name: Name = None) -> None:
    """List the tuners: which weights are trained."""
    from holdfast.tuners import TUNERS

    if name is None:
        _show_names(TUNERS.pages())
    else:
        _show_page(TUNERS.page(name))


def streams(
    context: typer.Context,
    name: Name = None,
    metrics: Annotated[bool, typer.Option("--metrics", help="List the metrics that tasks can be scored by.")] = False,
) -> None:
    """List the streams that are known by name."""
    from holdfast.data.streams.definition import find, known
    from holdfast.scoring import known as known_scorers

    if metrics:
        refuse(context, "has nothing to do with --metrics, which lists all metrics; leave one of them out", "name")
        for metric, scorer in known_scorers().items():
            say(f"{metric:23} {scorer.about}")
    elif name is None:
        for stream, definition in known().items():
            say(f"{stream:15} {definition.about}")
        say("\nholdfast streams NAME shows one in full: tasks, metrics, orders, and where its data are obtained.")
        say("Any folder of task folders is a stream too: stream: {path: FOLDER, order: [TASK, ...]}")
    else:
        _show_stream(name, find(name))


def _show_stream(name: str, definition: Definition) -> None:
    from inspect import getdoc, signature

    from holdfast.data.streams.definition import maker

    say(f"{name}, version {definition.version}\n\n{definition.about}\n\nobtained from: {definition.source}\n")
    keys = {"name": name} | ({"path": "FOLDER"} if definition.needs_path else {})
    if definition.make is None:
        say("tasks, their metrics and the source's own where it differs (scoring: source):")
        for task in definition.tasks:
            say(f"  {task.name:12} {task.metric}" + (f" ({task.source_metric})" if task.source_metric else ""))
    else:
        make = maker(definition)
        say(getdoc(make) or "")
        options = [key for key in signature(make).parameters if key != "path"]
        if options:
            keys |= {"options": "{" + ", ".join(f"{key}: ..." for key in options) + "}"}
        source = definition.defaults.get("source_metric")
        say(f"\nmetric: {definition.defaults['metric']}" + (f" ({source})" if source else ""))
    say("\norders, beside that of the list, reverse and random:SEED:" if definition.orders else "", end="")
    for order, tasks in definition.orders.items():
        say(f"\n  {order}: {', '.join(tasks)}", end="")
    say(f"\n\nstream: {{{', '.join(f'{key}: {value}' for key, value in keys.items())}}}")


def _show_names(pages: Sequence[Page]) -> None:
    width = max(len(page.name) for page in pages)
    for page in pages:
        say(f"{page.name:{width}}  {_sentence(page.doc)}")


def _sentence(text: str) -> str:
    """The lines until one ends with a full stop, as one line."""
    lines: list[str] = []
    for line in text.splitlines():
        lines.append(line.strip())
        if line.endswith("."):
            break
    return " ".join(lines)


def _show_page(page: Page) -> None:
    say(f"{page.name}\n\n{page.doc}\n")
    for line in _company(page.facts):
        say(line)
    say("options (default):")
    for key, default, description in page.options:
        say(f"  {key} ({default})\n      {description}")


def _company(facts: Mapping[str, Any]) -> list[str]:
    """What a method works with and without; nothing of a tuner."""
    lines = []
    if facts.get("tuners"):
        lines.append(f"tuner: {' or '.join(facts['tuners'])}, since {facts['tuners_reason']}\n")
    elif "default_tuner" in facts:
        lines.append(f"tuner: any; {facts['default_tuner']} where none is named\n")
    lines += [f"not with {other}: {reason}\n" for other, reason in facts.get("not_with", {}).items()]
    return lines
