"""Numbers and long texts as a person reads them."""

from __future__ import annotations

NOT_MEASURED = "not measured"


def number(value: float | None, signed: bool = False) -> str:
    """Three decimals, fewer for large numbers; a change carries its sign."""
    if value is None:
        return NOT_MEASURED
    text = f"{abs(value):,.3f}" if abs(value) < 100 else f"{abs(value):,.1f}"
    if float(text.replace(",", "")) == 0:
        return text
    return ("−" if value < 0 else "+" if signed else "") + text


def interval(ends: list[float] | None, signed: bool = False) -> str:
    """An interval in words, empty where there is none."""
    return f"{number(ends[0], signed)} to {number(ends[1], signed)}" if ends else ""


def shorten(text: str, length: int) -> str:
    """Leave out the middle of a text that is longer than ``length`` characters; its end counts for more than that."""
    if len(text) <= length:
        return text
    tail = length // 3
    return f"{text[: length - tail - 5].rstrip()} […] {text[-tail:].lstrip()}"
