"""A comparison as a table: Markdown, LaTeX and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from typing import Any

from holdfast.report.compare import Comparison
from holdfast.report.figures import COMPARED, COSTS, Figure, direction
from holdfast.report.text import number

MISSING = "–"


def notes(comparison: Comparison) -> list[str]:
    """What a reader of the table must know."""
    rows = comparison.rows
    lines = [f"NOT COMPARABLE, so that nobody is ranked or best: {line}." for line in comparison.different]
    if "dev" in (row["split"] for row in rows):
        lines.append("Measured on dev splits, on which settings are chosen; not what a paper reports.")
    if max(len(row["seeds"]) for row in rows) > 1:
        lines.append("Means over seeds; 95 % intervals (after ±, half of one): bootstrap over seeds and test examples.")
    else:
        lines.append(
            "95 % intervals (after ±, half of one): bootstrap over test examples; another seed may differ by more."
        )
    if any(row["difference"] for row in rows):
        lines.append(
            f"Difference: average less that of {comparison.baseline}, on the same test examples; p of a two-sided "
            "permutation test, not corrected for how many there are."
        )
    if any(row["reference"] for row in rows):
        lines.append("References, in brackets, compete with nobody.")
    return lines


def as_markdown(comparison: Comparison) -> str:
    """A table of GitHub's Markdown, the best of a column in bold, and notes below."""

    def escaped(text: str) -> str:
        return text.replace("|", "\\|").replace("<", "&lt;")

    head, body = _cells(comparison, escaped, bold=lambda text: f"**{text}**", plus_minus=" ± ")
    lines = [head, ["---", *["--:"] * (len(head) - 1)], *body]
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return "\n\n".join([table, *(escaped(note) for note in notes(comparison))]) + "\n"


def as_latex(comparison: Comparison) -> str:
    """A tabular of LaTeX (package booktabs), the best of a column in bold, and notes as comments."""
    head, body = _cells(comparison, _latex, bold=lambda text: rf"\textbf{{{text}}}", plus_minus=r" $\pm$ ")
    lines = [f"% {note}" for note in notes(comparison)]
    lines += [rf"\begin{{tabular}}{{l{'r' * (len(head) - 1)}}}", r"\toprule", " & ".join(head) + r" \\", r"\midrule"]
    lines += [" & ".join(line).replace("−", "$-$").replace(MISSING, "--") + r" \\" for line in body]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


def as_csv(comparison: Comparison) -> str:
    """One line a group with every number in full: ``KEY``, ``KEY_low`` and ``KEY_high`` of each figure; empty where it
    is not known. ``comparable`` is no where the runs cannot be compared."""
    lines = []
    for row in comparison.rows:
        line = {"method": row["run"], "seeds": " ".join(map(str, row["seeds"])), "reference": row["reference"]}
        line |= {"comparable": "no" if comparison.different else "yes", "rank": row["rank"]}
        for figure in COMPARED:
            low, high = row["intervals"].get(figure.key) or (None, None)
            line |= {figure.key: row[figure.key], f"{figure.key}_low": low, f"{figure.key}_high": high}
        line |= {figure.key: row[figure.key] for figure in COSTS}
        paired = row["difference"] or {}
        low, high = paired.get("interval") or (None, None)
        line |= {"baseline": comparison.baseline if paired else None, "difference": paired.get("difference")}
        lines.append(line | {"difference_low": low, "difference_high": high, "p": paired.get("p")})
    file = io.StringIO()
    writer = csv.DictWriter(file, fieldnames=list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return file.getvalue()


def label(row: dict[str, Any]) -> str:
    """What a row is called; a reference stands in brackets."""
    return f"({row['run']})" if row["reference"] else row["run"]


def with_interval(value: float | None, ends: Sequence[float] | None, signed: bool = False, sign: str = " ± ") -> str:
    """A figure and half of its interval."""
    if value is None:
        return MISSING
    return number(value, signed) + (f"{sign}{number((ends[1] - ends[0]) / 2)}" if ends else "")


def cost(value: float | None, key: str) -> str:
    """A cost as a person reads it, by the key of its figure."""
    if value is None:
        return MISSING
    if key == "tokens":
        return f"{value / 1e6:,.2f} M" if value >= 1e5 else f"{value:,.0f}"
    return f"{value:,.1f}" if key == "minutes" else f"{value:,.2f}"


def arrow(figure: Figure, comparison: Comparison) -> str:
    """Which direction is good."""
    return "↑" if direction(figure, comparison.lower) == "high" else "↓"


def p_value(p: float) -> str:
    """A p-value as a person reads it."""
    return f"{p:.3f}" if p >= 0.001 else f"{p:.1g}"


def _cells(
    comparison: Comparison, escaped: Callable[[str], str], bold: Callable[[str], str], plus_minus: str
) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table; columns of which nothing is known are left out."""
    rows = comparison.rows
    figures = comparison.figures
    paired = any(row["difference"] for row in rows)
    ranked = any(row["rank"] for row in rows)
    head = ["method", "seeds", *(["rank"] if ranked else [])]
    head += [f"{figure.label} {arrow(figure, comparison)}" for figure in figures]
    head += [figure.label for figure in COSTS] + (["difference", "p"] if paired else [])
    body = []
    for row in rows:
        line = [escaped(label(row)), str(len(row["seeds"]))]
        line += [str(row["rank"] or MISSING)] if ranked else []
        for figure in figures:
            cell = with_interval(row[figure.key], row["intervals"].get(figure.key), figure.signed, plus_minus)
            line.append(bold(cell) if figure.key in row["best"] else cell)
        line += [cost(row[figure.key], figure.key) for figure in COSTS]
        if paired:
            found = row["difference"]
            line += (
                [with_interval(found["difference"], found["interval"], True, plus_minus), p_value(found["p"])]
                if found
                else [MISSING, MISSING]
            )
        body.append(line)
    return [escaped(name) for name in head], body


def _latex(text: str) -> str:
    return text.translate(LATEX)


LATEX = str.maketrans(
    {sign: f"\\{sign}" for sign in "&%$#_{}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    | {"↑": r"$\uparrow$", "↓": r"$\downarrow$"}
)
