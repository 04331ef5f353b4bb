"""Numbers and long texts as a person reads them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from holdfast.system.terminal import printable

if TYPE_CHECKING:
    from holdfast.records.read import FinishedRun

NOT_MEASURED = "not measured"


def number(value: float | None, signed: bool = False) -> str:
    """Three decimals, fewer for large numbers; a change carries its sign."""
    if value is None:
        return NOT_MEASURED
    text = f"{abs(value):,.3f}" if abs(value) < 100 else f"{abs(value):,.1f}"
    if float(text.replace(",", "")) == 0:
        return text
    return ("−" if value < 0 else "+" if signed else "") + text


def share(value: float) -> str:
    """A share in percent; one decimal more where it would read as nothing or all and is not."""
    percent = 100 * value
    text = f"{percent:.0f}" if round(percent) not in (0, 100) or percent in (0, 100) else f"{percent:.1f}"
    return f"{text.replace('-', '−')} %"


def interval(ends: list[float] | None, signed: bool = False) -> str:
    """An interval in words, empty where there is none."""
    return f"{number(ends[0], signed)} to {number(ends[1], signed)}" if ends else ""


def shorten(text: str, length: int) -> str:
    """Leave out the middle of a text that is longer than ``length`` characters; its end counts for more than that."""
    if len(text) <= length:
        return text
    tail = length // 3
    return f"{text[: length - tail - 5].rstrip()} […] {text[-tail:].lstrip()}"


ONE_ROW = "one test row says nothing"


def learning(learned: Mapping[str, bool], one_row: Collection[str] = ()) -> str | None:
    """What a reader must know of forgetting where tasks were not learned; None where all were.

    Args:
        learned: by task, whether its own stage raised its score by more than its interval.
        one_row: the tasks of a single test row, of which that cannot be known.
    """
    missing = [task for task, rose in learned.items() if not rose and task not in one_row]
    unknown = [task for task in learned if task in one_row]
    sentences = []
    if missing and len(missing) == len(learned):
        sentences.append(
            "Nothing was learned: no score rose beyond its interval in the task's own stage. Forgetting says nothing. "
            "A higher learning rate, more epochs or more rows would be next."
        )
    elif missing:
        why = "the score did not rise beyond its interval in the task's own stage, so forgetting says nothing of it"
        sentences.append(f"Not learned: {_first(missing)}; {why}.")
    if unknown:
        sentences.append(f"Not known: {_first(unknown)}; {ONE_ROW} of what was learned or forgotten.")
    return " ".join(sentences) or None


def at_chance(matrix: Mapping[str, Any]) -> str | None:
    """The general abilities that stood at chance before training; None where none did, or that is not known.

    Args:
        matrix: the content of matrix.json.
    """
    stand = [
        f"{name} {number(matrix['general'][name][0])} ({interval(found['interval'])}; chance {number(found['level'])})"
        for name, found in matrix.get("chance", {}).items()
        if found["at_chance"] and name in matrix["general"]
    ]
    return f"At chance before training, so that a fall cannot show: {', '.join(stand)}." if stand else None


def _first(tasks: Sequence[str]) -> str:
    return ", ".join(tasks[:5]) + (f" and {len(tasks) - 5} more" if len(tasks) > 5 else "")


def lacking(run: FinishedRun) -> list[str]:
    """The figures of a run that lack scores which were never measured, each with the reason."""
    reasons = run.matrix.get("missing", {})
    return [f"{key} is null: {reason}." for key, reason in reasons.items() if "--backfill" in reason]


def in_markdown(text: str) -> str:
    """Text that stands in Markdown as it is: it begins no markup of its own, and ends no line or cell of a table."""
    for sign, written in (("&", "&amp;"), ("<", "&lt;"), ("|", "\\|"), ("`", "\\`"), ("[", "\\["), ("*", "\\*")):
        text = text.replace(sign, written)
    return " ".join(printable(text).split("\n"))


def code(text: str) -> str:
    """Text as a code span of Markdown."""
    return f"`{' '.join(printable(text).split()).replace('`', chr(39))}`"


def visible(token: str) -> str:
    """A token's text with its white space shown."""
    return token.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥")
