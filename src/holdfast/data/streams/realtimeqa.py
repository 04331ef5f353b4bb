"""RealTime QA as a yearly stream: quiz questions about the news, by the year in which they were asked."""

from __future__ import annotations

import datetime
import re
import string
from pathlib import Path
from typing import Any

from holdfast.api.task import Example, Stream, Task, Turn
from holdfast.data.choices import read_choices
from holdfast.data.files import read_rows, where
from holdfast.data.streams.definition import find
from holdfast.errors import DataError

_FILE = re.compile(r"(\d{4}|\d{8}_qa)\.jsonl")
_ID = re.compile(r"(\d{8})_\d+")


def realtimeqa(path: Path) -> Stream:
    """Read the questions: one task a year, which trains on questions with their answers and tests them as a quiz.

    Train asks the question alone, and the answer is the text of the right choice. Test asks the same questions with
    their choices: what is measured is whether the news of a year are known, in another form than they were learned.
    Both say the date, as the source's prompts do. Years and dates are those of the questions' ids.

    Args:
        path: folder with, at any depth, the source's DATE_qa.jsonl files, or a YEAR.jsonl a year.

    Raises:
        DataError: there is no such file, or a row cannot be used.
    """
    files = sorted(file for file in path.rglob("*.jsonl") if _FILE.fullmatch(file.name))
    if not files:
        raise DataError(
            f"{path}: holds no questions of RealTime QA; looked for DATE_qa.jsonl and YEAR.jsonl; they are obtained "
            f"from {find('realtimeqa').source}"
        )
    train: dict[str, list[Example]] = {}
    test: dict[str, list[Example]] = {}
    for file in files:
        for index, row in enumerate(read_rows(file)):
            place = where(file, index, row)
            date = _date(row, place)
            question, choices, right = read_choices(row, place)
            asked = f"Question: Today is {date:%B %d, %Y}. {question}\n"
            options = tuple(choice.strip() for choice in choices)
            listed = (f"{letter}) {option}\n" for letter, option in zip(string.ascii_uppercase, options, strict=False))
            quiz, answer = asked + "".join(listed), Turn("assistant", options[right])
            year = str(date.year)
            train.setdefault(year, []).append(Example(str(file), index, (_turn(asked), answer)))
            test.setdefault(year, []).append(Example(str(file), index, (_turn(quiz), answer), choices=options))
    return Stream("realtimeqa", [Task(year, "choice_likelihood", train[year], test[year]) for year in sorted(train)])


def _turn(asked: str) -> Turn:
    return Turn("user", asked + "Answer:", (len("Question: "), len(asked)))


def _date(row: dict[str, Any], place: str) -> datetime.date:
    found = _ID.fullmatch(str(row.get("question_id")))
    try:
        return datetime.datetime.strptime(found.group(1) if found else "", "%Y%m%d").date()
    except ValueError:
        raise DataError(f"{place}: question_id: must be YYYYMMDD_NUMBER, not {row.get('question_id')!r}") from None
