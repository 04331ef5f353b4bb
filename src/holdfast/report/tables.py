"""A comparison as a table: Markdown, LaTeX and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from typing import Any

from holdfast.report.compare import Comparison
from holdfast.report.figures import COMPARED, COSTS, Figure, direction
from holdfast.report.text import in_markdown, number
from holdfast.system.terminal import printable

MISSING = "–"
ONE_SEED = "over test examples alone, which says nothing of training noise; another seed may differ by more"


def notes(comparison: Comparison, *, plus_minus: bool = False) -> list[str]:
    """What a reader of the table must know.

    Args:
        plus_minus: whether intervals are written as ±; else their ends stand below the values.
    """
    rows = comparison.rows
    lines = [f"NOT COMPARABLE, so that nobody is ranked or best: {line}." for line in comparison.different]
    if "dev" in (row["split"] for row in rows):
        lines.append("Measured on dev splits, on which settings are chosen; not what a paper reports.")
    lines += interval_notes(comparison, plus_minus=plus_minus)
    for row in rows:
        if row["unfinished"]:
            lines.append(f"NOT FINISHED: {row['run']}; its figures are null, or of the stages that are done.")
        if row["not_learned"] and row["reference"] is None:
            lines.append(
                f"NOT LEARNED by {row['run']}: {', '.join(row['not_learned'])}; of these forgetting says nothing, "
                "since the score did not rise beyond its interval in the task's own stage."
            )
    if low := list(dict.fromkeys(name for row in rows for name in row["at_chance"])):
        lines.append(f"At chance before training, so that a fall cannot show: {', '.join(low)}.")
    if any(row["reference"] for row in rows):
        lines.append("References, in brackets, compete with nobody.")
    return lines


def interval_notes(comparison: Comparison, *, plus_minus: bool = False) -> list[str]:
    """What the intervals and p-values speak of, as far as there are any: seeds or test examples alone."""
    intervals = "95 % intervals (after ±, half of one)" if plus_minus else "95 % intervals"
    counted = {len(row["seeds"]) for row in comparison.rows if has_intervals(row, comparison)}
    lines = []
    if max(counted, default=1) > 1:
        lines.append(f"Means over seeds; {intervals}: Student's t, over seeds and test examples.")
    elif any(len(row["seeds"]) > 1 for row in comparison.rows):
        lines.append("Means over seeds.")
    if 1 in counted:
        lines.append(f"{'Intervals of one seed' if max(counted) > 1 else intervals}: {ONE_SEED}.")
    return lines + _difference_notes(comparison)


def has_intervals(row: dict[str, Any], comparison: Comparison) -> bool:
    """Whether a row shows an interval, of a figure or of its difference to the baseline."""
    shown = [figure.key for figure in comparison.figures if row[figure.key] is not None]
    return any(row["intervals"].get(key) for key in shown) or bool((row["difference"] or {}).get("interval"))


def _difference_notes(comparison: Comparison) -> list[str]:
    """How the differences to the baseline were tested, and how small a difference would have been found."""
    differences = [row["difference"] for row in comparison.rows if row["difference"]]
    if not differences:
        return []
    count = len(differences)
    how = "corrected for the number of comparisons (Holm)" if count > 1 else "of one comparison"
    lines = [
        f"Difference: average less that of {comparison.baseline}, on the same test examples; p is two-sided, {how}."
    ]
    over = {difference["over"] for difference in differences}
    if "seeds" in over:
        pairs = sum(difference["paired"] for difference in differences)
        lines.append(
            f"p of several seeds: Student's t over seeds and test examples; {pairs} of {count} paired by seed."
        )
    if "test examples" in over:
        lines.append(f"p of one seed: permutation test, {ONE_SEED}.")
    found = [size for difference in differences if (size := difference["detectable"]) is not None]
    if not found:
        return lines
    span = number(min(found)) + (f" to {number(max(found))}" if max(found) > min(found) else "")
    return [*lines, f"Smallest true difference that such runs find in 80 of 100 cases (uncorrected p < 0.05): {span}."]


def as_markdown(comparison: Comparison) -> str:
    """A table of GitHub's Markdown, the best of a column in bold, and notes below."""

    head, body = _cells(comparison, in_markdown, bold=lambda text: f"**{text}**", plus_minus=" ± ")
    lines = [head, ["---", *["--:"] * (len(head) - 1)], *body]
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return "\n\n".join([table, *(in_markdown(note) for note in notes(comparison, plus_minus=True))]) + "\n"


def as_latex(comparison: Comparison) -> str:
    """A tabular of LaTeX (package booktabs), the best of a column in bold, and notes as comments."""
    head, body = _cells(comparison, _latex, bold=lambda text: rf"\textbf{{{text}}}", plus_minus=r" $\pm$ ")
    lines = [f"% {' '.join(printable(note).splitlines())}" for note in notes(comparison, plus_minus=True)]
    lines += [rf"\begin{{tabular}}{{l{'r' * (len(head) - 1)}}}", r"\toprule", " & ".join(head) + r" \\", r"\midrule"]
    lines += [" & ".join(line).replace("−", "$-$").replace(MISSING, "--") + r" \\" for line in body]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


def _no_formula(name: str | None) -> str | None:
    return f"'{name}" if name and name.startswith(("=", "+", "-", "@", "\t", "\r")) else name


def as_csv(comparison: Comparison) -> str:
    """One line a group with every number in full: ``KEY``, ``KEY_low`` and ``KEY_high`` of each figure; empty where it
    is not known. ``comparable`` is no where the runs cannot be compared. A name that a spreadsheet would take for a
    formula begins with an apostrophe."""
    lines = []
    for row in comparison.rows:
        line = {"method": _no_formula(row["run"]), "seeds": " ".join(map(str, row["seeds"]))}
        comparable = "no" if comparison.different else "yes"
        line |= {"reference": row["reference"], "comparable": comparable, "rank": row["rank"]}
        for figure in COMPARED:
            low, high = row["intervals"].get(figure.key) or (None, None)
            line |= {figure.key: row[figure.key], f"{figure.key}_low": low, f"{figure.key}_high": high}
        line |= {figure.key: row[figure.key] for figure in COSTS}
        paired = row["difference"] or {}
        low, high = paired.get("interval") or (None, None)
        line |= {"baseline": _no_formula(comparison.baseline) if paired else None}
        line |= {"difference": paired.get("difference"), "difference_low": low, "difference_high": high}
        lines.append(line | {key: paired.get(key) for key in ("p", "p_holm", "detectable", "over")})
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
    head += [figure.label for figure in COSTS] + (["difference", "p (Holm)", "detectable"] if paired else [])
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
            line += _difference_cells(found, plus_minus) if found else [MISSING] * 3
        body.append(line)
    return [escaped(name) for name in head], body


def _difference_cells(found: dict[str, Any], plus_minus: str) -> list[str]:
    difference = with_interval(found["difference"], found["interval"], True, plus_minus)
    return [difference, p_value(found["p_holm"]), number(found["detectable"])]


def _latex(text: str) -> str:
    return printable(text).translate(LATEX)


LATEX = str.maketrans(
    {sign: f"\\{sign}" for sign in "&%$#_{}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    | {"↑": r"$\uparrow$", "↓": r"$\downarrow$"}
)
