"""The gate's checks as text, as Markdown and as JUnit XML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from xml.etree import ElementTree

from holdfast.records.gate import DONE, Check, failed, recorded
from holdfast.report.text import interval, number
from holdfast.system.terminal import printable

HEAD = ("figure", "value", "95 % interval", "limit", "beyond it by", "verdict")


def rows(checks: Sequence[Check]) -> list[tuple[str, ...]]:
    """A row a check, under HEAD; those that failed come first."""
    return [
        (
            check.figure,
            number(check.value),
            interval(check.interval) or "–",
            number(check.limit),
            "–" if check.passed or check.beyond is None else number(check.beyond),
            check.verdict,
        )
        for check in failed_first(checks)
    ]


def decisions(info: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What a run's gate decided after each stage, for people: ``stage``, ``task``, ``passed``, ``what`` the run did
    then, and the ``rows`` of the checks.

    Args:
        info: run.json.
    """
    found = []
    for decision in info.get("gate", []):
        checks = recorded(decision["checks"])
        what = "passed" if decision["passed"] else f"failed: {DONE[decision['action']]}"
        if decision["action"] == "rollback":
            what += f" to stage {decision['current']}" if decision["current"] else " to the model before training"
        found.append({key: decision[key] for key in ("stage", "task", "passed")} | {"what": what, "rows": rows(checks)})
    return found


def as_text(checks: Sequence[Check]) -> str:
    """An aligned table for a terminal or a log."""
    table = [HEAD, *rows(checks)]
    widths = [max(len(row[i]) for row in table) for i in range(len(HEAD))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]
    return "\n".join(f"  {line}" for line in lines)


def as_markdown(checks: Sequence[Check], title: str) -> str:
    """A summary with the verdict in its heading."""
    lines = [f"### {_cell(title)}: gate {'failed' if failed(checks) else 'passed'}", ""]
    if not checks:
        return "\n".join([*lines, "There is nothing to check yet."]) + "\n"
    for row in (HEAD, ("---", *["--:"] * 4, "---"), *rows(checks)):
        lines.append("| " + " | ".join(map(_cell, row)) + " |")
    return "\n".join(lines) + "\n"


def as_junit(checks: Sequence[Check], title: str) -> str:
    """A test suite with one case a check, in the JUnit XML that CI systems read."""
    suite = ElementTree.Element(
        "testsuite", name=_printable(title), tests=str(len(checks)), failures=str(len(failed(checks))), errors="0"
    )
    for check, row in zip(failed_first(checks), rows(checks), strict=True):
        case = ElementTree.SubElement(suite, "testcase", classname=f"gate.{check.key}", name=_printable(check.figure))
        if not check.passed:
            failure = ElementTree.SubElement(case, "failure", message=check.verdict)
            failure.text = ", ".join(f"{head}: {_printable(cell)}" for head, cell in zip(HEAD, row, strict=True))
    ElementTree.indent(suite)
    return ElementTree.tostring(suite, encoding="unicode", xml_declaration=True) + "\n"


def failed_first(checks: Sequence[Check]) -> list[Check]:
    return sorted(checks, key=lambda check: check.passed)


def _cell(text: str) -> str:
    """Text that no sign of it takes out of its cell of a Markdown table, or makes a link or a picture."""
    for sign, written in (("\\", "\\\\"), ("&", "&amp;"), ("<", "&lt;"), ("|", "\\|"), ("[", "\\["), ("\n", " ")):
        text = text.replace(sign, written)
    return printable(text)


def _printable(text: str) -> str:
    """Text without the control characters that XML 1.0 has no way to write."""
    return "".join(sign if sign >= " " or sign in "\t\n" else "\ufffd" for sign in text)
