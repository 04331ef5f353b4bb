"""Boxes in a picture: how well the box that a response names overlaps with the right one."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from holdfast.api.scorer import Scorer
from holdfast.api.task import Example

Box = tuple[float, float, float, float]

_NUMBER = r"([-+]?(?:\d+(?:\.\d*)?|\.\d+))"
_BETWEEN = r"(?:\s*,\s*|\s+)"
_POINT = _NUMBER + _BETWEEN + _NUMBER
_FOUR = _POINT + _BETWEEN + _POINT
_OPEN, _CLOSED = r"[\[({<]\s*", r"\s*[\])}>]"
_BOXES = (
    re.compile(f"{_OPEN}{_FOUR}{_CLOSED}|{_OPEN}{_POINT}{_CLOSED}\\s*,?\\s*{_OPEN}{_POINT}{_CLOSED}"),
    re.compile(f"^\\s*{_FOUR}\\s*$"),
)


def box(text: str) -> Box | None:
    """The first box [x1, y1, x2, y2] that a text names; None if it names none.

    Four numbers, divided by commas or spaces, within one pair of brackets of any kind ("[0.1, 0.2, 0.5, 0.9]",
    "<box>(12 30 400 520)</box>"), or two within each of two pairs that follow each other ("(12,30),(400,520)"). Text
    that consists of the four numbers alone needs no brackets.
    """
    for pattern in _BOXES:
        if found := pattern.search(text):
            x1, y1, x2, y2 = (float(number) for number in found.groups() if number is not None)
            return x1, y1, x2, y2
    return None


def overlap(a: Sequence[float], b: Sequence[float]) -> float:
    """Intersection over union of two boxes (x1, y1, x2, y2); 0 where one has no area."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    common = max(0.0, width) * max(0.0, height)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - common
    return common / union if union > 0 else 0.0


def iou(response: str, answer: str) -> float:
    """Intersection over union of the first box of the response and that of the answer; 0 where there is none.

    Both must be in the same unit; it may be shares of the picture, thousandths or pixels, since the ratio is the same.
    """
    found, right = box(response), box(answer)
    return 0.0 if found is None or right is None else overlap(found, right)


def iou_accuracy(response: str, answer: str) -> float:
    """1 if the intersection over union is more than 0.5, otherwise 0: the accuracy of RefCOCO and its kin."""
    return float(iou(response, answer) > 0.5)


def coin_iou_accuracy(response: str, answer: str) -> float:
    """:func:`iou_accuracy` as CoIN's code reads a response: without square brackets, and then without its first and
    last character, what is left must be four numbers with commas between them.

    So "[0.12, 0.3, 0.45, 0.78]" is read as .12, 0.3, 0.45 and 0.7.
    """
    right = box(answer)
    try:
        found = [float(number) for number in response.strip().replace("[", "").replace("]", "")[1:-1].split(",")]
    except ValueError:
        return 0.0
    return float(right is not None and len(found) == 4 and overlap(found, right) > 0.5)


class Boxes(Scorer):
    """A score of two boxes; a test example whose answer names no box is refused."""

    def __init__(self, name: str, row: Callable[[str, str], float], about: str):
        super().__init__(name, row, about)

    def refusal(self, example: Example, labels: Sequence[str] | None) -> str | None:
        if box(example.answer) is not None:
            return None
        return f"the answer {example.answer!r:.60} names no box; right would be [x1, y1, x2, y2]"


SCORERS = [
    Boxes("iou", iou, "intersection over union with the answer's box [x1, y1, x2, y2]"),
    Boxes("iou_accuracy", iou_accuracy, "1 if the intersection over union is more than 0.5 (RefCOCO)"),
    Boxes("coin_iou_accuracy", coin_iou_accuracy, "the same, with the last digit lost (CoIN)"),
]
