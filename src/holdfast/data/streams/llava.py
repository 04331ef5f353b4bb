"""Test files of LLaVA's kind, {question_id, image, text, answer}: their rows as conversations like those of training.

Each function takes the rows of a test file, its path and the folder that the paths of pictures start from, and is what
a definition names as ``test_rows``. A row that is a conversation already stays as it is, and gets its right answers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from holdfast.data.files import RawRow, read_json_file, where
from holdfast.errors import DataError
from holdfast.system.files import json_text

MARK = "<image>"
TEXTVQA = "TextVQA_0.5.1_val.json"
CAPTIONS = "val_coco_type*.json"

Rows = list[dict[str, Any]]


def asked(rows: Rows, file: Path, pictures: Path) -> Rows:
    """Conversations that ask the picture's question and have its ``answer``, or its ``answer_bbox``, a box as text."""
    return [_conversation(row, place) for row, place in _placed(rows, file)]


def asked_finance(rows: Rows, file: Path, pictures: Path) -> Rows:
    """As :func:`asked`, with what MLLM-CL adds to the questions about finance: that yes or no, or a letter, is asked
    for, as the answer is."""
    return [
        _conversation(
            row,
            place,
            " Only answer with yes or no directly."
            if row.get("answer") in ("Yes", "No")
            else " Answer with the given letter directly, e.g., A, B, C, D.",
        )
        for row, place in _placed(rows, file)
    ]


def textvqa(rows: Rows, file: Path, pictures: Path) -> Rows:
    """As :func:`asked`, with the answers of ten people from TextVQA's file of the validation questions.

    It is looked for beside the test file, and in the folder of pictures and its folder ``TextVQA``.

    Raises:
        DataError: there is no such file, or it lacks a question.
    """
    places = [file.parent, pictures, pictures / "TextVQA"]
    answers = next((place / TEXTVQA for place in places if (place / TEXTVQA).is_file()), None)
    if answers is None:
        raise DataError(
            f"{file}: {TEXTVQA}, which has the answers of ten people to each question, is not in "
            f"{', '.join(map(str, dict.fromkeys(places)))}; https://textvqa.org/dataset has it"
        )
    found = _listed(answers, "data")
    people = {str(entry.get("question_id")): entry.get("answers") for entry in found}
    right = []
    for row, place in _placed(rows, file):
        question = str(row.get("question_id"))
        if question not in people:
            raise DataError(f"{place}: question_id: {question!r} is not in {answers}")
        right.append(people[question])
    return _with_right_answers(rows, file, right)


def captions(rows: Rows, file: Path, pictures: Path) -> Rows:
    """As :func:`asked`, with all captions of each row's picture, from the one file val_coco_type*.json beside the test
    file: picture n of it, counted from 1, is that of row n.

    Raises:
        DataError: there is no such file, or its pictures are not those of the rows.
    """
    beside = sorted(file.parent.glob(CAPTIONS))
    if len(beside) != 1:
        raise DataError(
            f"{file}: {CAPTIONS}, which has the captions of each picture, must be beside it once, and is there "
            f"{len(beside)} times"
        )
    names = {entry.get("id"): Path(str(entry.get("file_name"))).name for entry in _listed(beside[0], "images")}
    written: dict[Any, list[Any]] = {}
    for entry in _listed(beside[0], "annotations"):
        written.setdefault(entry.get("image_id"), []).append(entry.get("caption"))
    right = []
    for number, (row, place) in enumerate(_placed(rows, file), 1):
        name = Path(str(row.get("image"))).name
        if number not in written or names.get(number, name) != name:
            shown = f"is of {names[number]}" if number in names and number in written else "has no caption"
            raise DataError(f"{place}: image: {name} is not picture {number} of {beside[0]}, which {shown}")
        right.append(written[number])
    return _with_right_answers(rows, file, right)


def _with_right_answers(rows: Rows, file: Path, right: Sequence[Any]) -> Rows:
    """Conversations whose right answers are those given; the first is the row's own where its own is none of them."""
    made = []
    for (row, place), answers in zip(_placed(rows, file), right, strict=True):
        if not isinstance(answers, list) or not answers:
            raise DataError(f"{place}: its right answers must be a list of at least one, not {answers!r:.60}")
        own = row.get("answer")
        own = own if own in answers else answers[0]
        made.append(_conversation(_copy(row, {"answer": own, "right_answers": answers}), place))
    return made


def _conversation(row: Mapping[str, Any], place: str, after: str = "") -> dict[str, Any]:
    """The picture, the question and what follows it, and the answer; a conversation with the answer in its last turn.

    LLaVA's code shows the picture first and takes marks from the question, and so does this.
    """
    answer = row.get("answer", row.get("answer_bbox"))
    if "conversations" in row and "text" not in row:
        turns = row["conversations"]
        if answer is not None and isinstance(turns, list) and len(turns) > 1:
            turns = [*turns[:-1], {"from": "gpt", "value": _as_text(answer)}]
        return _copy(row, {"conversations": turns})
    question = row.get("text")
    if not isinstance(question, str) or answer is None:
        keys = ", ".join(map(repr, row))
        raise DataError(f"{place}: must have text, the question, and answer or answer_bbox; has {keys}")
    question = question.replace(MARK, "").strip() + after
    mark = f"{MARK}\n" if row.get("image") else ""
    turns = [{"from": "human", "value": mark + question}, {"from": "gpt", "value": _as_text(answer)}]
    return _copy(row, {"conversations": turns})


def _as_text(answer: Any) -> str:
    """An answer that is a number or a box, as text."""
    return answer if isinstance(answer, str) else json_text(answer)


def _copy(row: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The row with changes, with its place in the file; a conversation without what says the same."""
    made = RawRow({**row, **changes})
    if "conversations" in changes:
        for key in ("text", "answer", "answer_bbox"):
            made.pop(key, None)
    made.line, made.index = getattr(row, "line", None), getattr(row, "index", 0)
    return made


def _placed(rows: Rows, file: Path) -> list[tuple[dict[str, Any], str]]:
    return [(row, where(file, getattr(row, "index", number), row)) for number, row in enumerate(rows)]


def _listed(file: Path, key: str) -> list[dict[str, Any]]:
    """The objects of a JSON file's list."""
    values = read_json_file(file)
    found = values.get(key) if isinstance(values, dict) else None
    if not isinstance(found, list) or not all(isinstance(entry, dict) for entry in found):
        raise DataError(f"{file}: must be an object with {key}, a list of objects")
    return found
