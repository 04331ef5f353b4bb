"""Questions with choices: what a row offers, which of it is right, and how it is asked by letter."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

from holdfast.data.files import where
from holdfast.errors import DataError

Question = tuple[str, list[str], int]
Answers = Literal["names", "texts"]

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_FORMAT = re.compile(r"Answer format:\s*(\S+(?:/\S+)+)\s*$")
_REQUEST = re.compile(r"\s*(Please [^:\n]*(?:question|sentence)):\s*")


def read_choices(row: dict[str, Any], place: str, answers: Answers = "names") -> Question:
    """Question, choices and the index of the right one, of a row of one of these shapes, told by its keys.

    - {question (or question_sentence), choices, answer}: MMLU, RealTimeQA;
    - {ctx, endings, label}: HellaSwag's own files;
    - {instruction, input, output, answer}: LLM-Adapters' ARC and BoolQ. The question is the instruction, and the input
      where there is one; the choices are those that its last words name, "Answer format: true/false".

    Args:
        place: of the row, for messages.
        answers: of a row with an instruction, what is chosen from. names: the words after "Answer format:". texts: what
            these words stand for, "Answer1: TEXT Answer2: TEXT"; the question is then the question alone. Where the
            sentence has a blank (_), the question ends before it, and each choice is its text with what follows.

    Raises:
        DataError: a key is missing or of another kind, or the answer names no choice, or more than one; the texts of
            the answers cannot be told, or are asked for where the row has a list of them.
    """
    if answers == "texts" and ("endings" in row or "choices" in row):
        key = "endings" if "endings" in row else "choices"
        raise DataError(f"{place}: {key}: are texts already; leave out answers: texts, which is for instructions")
    if "endings" in row:
        return _question(row, "ctx", "endings", "label", place)
    if "choices" in row or "instruction" not in row:
        asked = "question_sentence" if "question_sentence" in row and "question" not in row else "question"
        return _question(row, asked, "choices", "answer", place)
    parts = [row["instruction"], row.get("input") or ""]
    if not all(isinstance(part, str) for part in parts):
        raise DataError(f"{place}: instruction and input: must be texts, not {parts!r}")
    offered = _FORMAT.search(parts[0])
    if offered is None:
        raise DataError(
            f"{place}: instruction: must end with the answers that there are, such as Answer format: true/false, "
            f"not with {parts[0][-40:]!r}"
        )
    names = offered[1].split("/")
    found = {"instruction": parts[0], "choices": names, "answer": row.get("answer")}
    if answers == "texts":
        right = _right(row.get("answer"), names, f"{place}: answer")
        question, texts = _texts(parts[0][: offered.start()], names, f"{place}: instruction")
        found = {"instruction": question, "choices": texts, "answer": right}
    found["instruction"] = "\n".join(part for part in (found["instruction"], parts[1]) if part.strip())
    return _question(found, "instruction", "choices", "answer", place)


def _texts(instruction: str, names: list[str], place: str) -> tuple[str, list[str]]:
    """The question alone and the texts that the names of the answers stand for; the names, where they are no more."""
    marks = [list(re.finditer(rf"(?<!\S){re.escape(name)}:", instruction, re.IGNORECASE)) for name in names]
    question, texts = instruction, names
    if any(marks):
        first = [found[0].start() if len(found) == 1 else -1 for found in marks]
        if first != sorted(set(first)) or -1 in first:
            raise DataError(
                f"{place}: must hold {', '.join(f'{name}:' for name in names)} once each and in this order, each "
                f"before its text, not {', '.join(found[0] for several in marks for found in several)}"
            )
        ends = [*first[1:], len(instruction)]
        question = instruction[: first[0]]
        texts = [instruction[found[0].end() : end].strip() for found, end in zip(marks, ends, strict=True)]
    request = _REQUEST.match(question)
    question = question[request.end() if request else 0 :].strip()
    if request is None or "blank" not in request[1]:
        return question, texts
    before, *after = question.split("_")
    if len(after) != 1 or not before.strip():
        raise DataError(f"{place}: must have one blank (_), and words before it, not {question!r}")
    return before.rstrip(), [text + after[0] for text in texts]


def by_letter(
    rows: list[dict[str, Any]],
    questions: list[Question],
    dev: list[dict[str, Any]],
    answered: list[Question],
    shots: int,
    path: Path,
    dev_path: str | None,
    answers: Answers = "names",
) -> tuple[list[Question], list[list[str]]]:
    """Ask questions as MMLU does (Hendrycks et al. 2021), with their letters in the place of the choices.

    Args:
        rows: of the questions; ``subject`` says what a question is about, where there is one.
        dev, answered: rows of the questions that may be shown with their answers, and these questions.
        shots: how many are shown: the first of the same subject.
        path, dev_path: where rows and dev came from, for messages.
        answers: with which rows were read (:func:`read_choices`).

    Returns:
        The questions, and for each the pieces of text before it: a heading and the demonstrations.

    Raises:
        DataError: a row names its own answers, or has more choices than there are letters; a row of dev cannot be
            used; a subject has fewer demonstrations than shots.
    """
    demonstrations: dict[Any, list[str]] = {}
    for i, (row, question) in enumerate(zip(dev, answered, strict=True)):
        asked, letters, right = _lettered(row, question, where(str(dev_path), i, row), answers)
        demonstrations.setdefault(row.get("subject"), []).append(f"{asked} {letters[right]}\n\n")
    found, shown = [], []
    for i, (row, question) in enumerate(zip(rows, questions, strict=True)):
        place, subject = where(path, i, row), row.get("subject")
        known = demonstrations.get(subject, [])
        if len(known) < shots:
            raise DataError(
                f"{place}: subject: {dev_path} holds {len(known)} demonstrations of {subject!r}, not the {shots} of "
                "shots; add some, or show fewer"
            )
        about = f" about {subject.replace('_', ' ')}" if isinstance(subject, str) else ""
        heading = f"The following are multiple choice questions (with answers){about}.\n\n"
        found.append(_lettered(row, question, place, answers))
        shown.append([heading, *known[:shots]])
    return found, shown


def _lettered(row: dict[str, Any], question: Question, place: str, answers: Answers) -> Question:
    """A question with its choices under letters, which are what is chosen from."""
    asked, choices, right = question
    if answers == "names" and "choices" not in row and "endings" not in row:
        raise DataError(
            f"{place}: instruction: names its own answers ({'/'.join(choices)}); leave out by: letter, or write "
            "answers: texts"
        )
    if len(choices) > len(LETTERS):
        raise DataError(f"{place}: choices: {len(choices)} are more than there are letters; leave out by: letter")
    lines = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False)]
    return "\n".join([asked, *lines, "Answer:"]), list(LETTERS[: len(choices)]), right


def _question(row: dict[str, Any], question_key: str, choices_key: str, answer_key: str, place: str) -> Question:
    question, choices = row.get(question_key), row.get(choices_key)
    if not isinstance(question, str) or not question.strip():
        raise DataError(f"{place}: {question_key}: must be text; found the keys {', '.join(map(repr, row))}")
    if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
        raise DataError(f"{place}: {choices_key}: must be a list of texts, not {choices!r}")
    right = _right(row.get(answer_key), choices, f"{place}: {answer_key}")
    kept = [i for i, choice in enumerate(choices) if choice.strip()]  # tables of questions pad short lists with blanks
    if len(kept) < 2 or right not in kept:
        raise DataError(
            f"{place}: {choices_key}: must be at least two texts, the right one among them, not {choices!r}"
        )
    return question, [choices[i] for i in kept], kept.index(right)


def _right(answer: Any, choices: list[str], place: str) -> int:
    """Which choice ``answer`` means: an index, [an index], a letter, or the text of the choice."""
    meant: set[int] = set()
    if isinstance(answer, list) and len(answer) == 1 and str(answer[0]).isdecimal():
        answer = int(answer[0])
    if type(answer) is int:
        meant = {answer} & set(range(len(choices)))
    elif isinstance(answer, str):
        meant = {
            i
            for i, choice in enumerate(choices)
            if answer.strip() in (choice.strip(), str(i)) or answer.strip().upper() == LETTERS[i : i + 1]
        }
    if len(meant) != 1:
        raise DataError(
            f"{place}: {answer!r} {'names no choice' if not meant else 'could be two choices'}; it must be an "
            f"index from 0 to {len(choices) - 1}, a letter, or the text of one of {choices!r}"
        )
    return meant.pop()
