"""Questions with choices: what a row offers, and which of it is right."""

from __future__ import annotations

from typing import Any

from holdfast.errors import DataError


def read_choices(row: dict[str, Any], place: str) -> tuple[str, list[str], int]:
    """Question, choices and the index of the right one, of a row of question (or question_sentence), choices, answer.

    Args:
        place: of the row, for messages.

    Raises:
        DataError: a key is missing or of another kind, or the answer names no choice, or more than one.
    """
    question = row.get("question", row.get("question_sentence"))
    if not isinstance(question, str) or not question.strip():
        raise DataError(f"{place}: question: must be text; found the keys {', '.join(map(repr, row))}")
    choices = row.get("choices")
    if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
        raise DataError(f"{place}: choices: must be a list of texts, not {choices!r}")
    right = _right(row.get("answer"), choices, place)
    kept = [i for i, choice in enumerate(choices) if choice.strip()]  # tables of questions pad short lists with blanks
    if len(kept) < 2 or right not in kept:
        raise DataError(f"{place}: choices: must be at least two texts, the right one among them, not {choices!r}")
    return question, [choices[i] for i in kept], kept.index(right)


def _right(answer: Any, choices: list[str], place: str) -> int:
    """Which choice ``answer`` means: an index, [an index], a letter, or the text of the choice."""
    meant: set[int] = set()
    if isinstance(answer, list) and len(answer) == 1 and str(answer[0]).isdecimal():
        answer = int(answer[0])
    if type(answer) is int:
        meant = {answer} & set(range(len(choices)))
    elif isinstance(answer, str):
        letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
        meant = {
            i
            for i, choice in enumerate(choices)
            if answer.strip() in (choice.strip(), str(i)) or answer.strip().upper() == letters[i : i + 1]
        }
    if len(meant) != 1:
        raise DataError(
            f"{place}: answer: {answer!r} {'names no choice' if not meant else 'could be two choices'}; it must be an "
            f"index from 0 to {len(choices) - 1}, a letter, or the text of one of {choices!r}"
        )
    return meant.pop()
