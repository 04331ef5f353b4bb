"""What the gate found, as the Markdown of a pull request's comment."""

from __future__ import annotations

import re
from collections.abc import Sequence
from urllib.parse import quote

from holdfast.records.gate import Check, Judged, StageFigures, failed
from holdfast.report.figures import FIGURES
from holdfast.report.text import interval, learning, number
from holdfast.report.verdict import HEAD, failed_first, rows

MARK = "<!-- holdfast gate -->"
"""The first line, by which a job finds the comment that it wrote before."""

LONGEST = 100
"""Characters of a name that are shown."""


def as_comment(judged: Judged, page: str | None = None) -> str:
    """A comment: the verdict, the figures with their intervals, what was learned, and what was forgotten.

    Names come from data that anybody may have written. They stand in code spans, in which nothing is a link, an image,
    a mention or HTML.

    Args:
        page: the address of the run's page, to which the comment links.
    """
    run, checks, found = judged.run, judged.checks, StageFigures(judged.run, judged.row)
    lines = [MARK, f"### Forgetting gate: {'failed' if failed(checks) else 'passed'}", "", code(judged.title), ""]
    learned = {task: run.learned[task] for task in found.tasks if task in run.learned}
    if (note := learning(learned, run.one_row)) is not None:
        lines += [f"**{code(note)}**", ""]
    if checks:
        cells = zip(rows(checks), failed_first(checks), strict=True)
        lines += _table(HEAD, [[code(row[0], cell=True), *row[1:5], _verdict(check)] for row, check in cells])
    else:
        lines += ["There is nothing to check yet.", ""]
    lines += _table(("figure", "value", "95 % interval"), _figures(found))
    lines += _table(("task", "before its stage", "after it", "learned", "95 % interval"), _learned(found))
    lines += _table(("task", "after its stage", "now", "forgotten", "95 % interval"), _forgotten(found))
    if page is not None:
        lines.append(f"[The run's page]({quote(page, safe=':/?#@!$&*+,;=%~')}) has plots, examples and the costs.")
    else:
        lines.append(f"The run's page: {code(str(run.path / 'report.html'))}")
    return "\n".join(lines) + "\n"


def _verdict(check: Check) -> str:
    """The outcome, and its note, which holds names, as a code span."""
    outcome = check.verdict.removesuffix(f"; {check.note}")
    return f"{outcome}; {code(check.note, cell=True)}" if check.note else outcome


def code(text: str, cell: bool = False) -> str:
    """A text as a code span, whatever stands in it.

    Args:
        cell: whether it is for a cell of a table, where a bar needs a backslash even here.
    """
    text = re.sub(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\s]+", " ", text).strip()
    text = text if len(text) <= LONGEST or not cell else f"{text[: LONGEST - 1]}…"
    fence = "`" * (max(map(len, re.findall("`+", text)), default=0) + 1)
    room = " " if "`" in (text[:1], text[-1:]) else ""
    span = f"{fence}{room}{text}{room}{fence}" if text else ""
    return span.replace("|", "\\|") if cell else span


def _table(head: Sequence[str], cells: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table, and an empty one; none where it has no rows."""
    if not cells:
        return []
    written = [list(head), ["---", *["--:"] * (len(head) - 1)], *cells]
    return [*("| " + " | ".join(row) + " |" for row in written), ""]


def _figures(found: StageFigures) -> list[list[str]]:
    figures = [figure for figure in FIGURES if found.summary.get(figure.key) is not None]
    return [
        [
            figure.label,
            number(found.summary[figure.key], figure.signed),
            interval(found.summary_intervals.get(figure.key), figure.signed) or "–",
        ]
        for figure in figures
    ]


def _learned(found: StageFigures) -> list[list[str]]:
    """A line for each task, in the order in which they were learned."""
    lines = []
    for j in range(len(found.tasks)):
        after = found.run.own_stage(j)
        before = 0 if found.run.joint else after - 1
        gain, ends = found.run.gains[j]
        scores = [number(found.run.scores[t][j]) for t in (before, after)]
        lines.append([code(found.tasks[j], cell=True), *scores, number(gain, True), interval(ends, True) or "–"])
    return lines


def _forgotten(found: StageFigures) -> list[list[str]]:
    """A line for each earlier task, the one that lost most first."""
    if found.run.joint:
        return []
    lost = list(zip(found.tasks, found.forgotten(), strict=True))[:-1]
    lines = []
    for task, (value, ends) in sorted(lost, key=lambda one: -(one[1][0] or 0.0)):
        j = found.tasks.index(task)
        scores = [number(found.run.scores[t][j]) for t in (found.run.own_stage(j), found.row)]
        lines.append([code(task, cell=True), *scores, number(value), interval(ends) or "–"])
    return lines
