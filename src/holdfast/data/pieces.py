"""The pieces that the text of a row is tokenised in, and the plain template: turns joined by newlines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from holdfast.api.task import Example, Turn
from holdfast.data.files import where
from holdfast.errors import DataError


@dataclass(frozen=True)
class Piece:
    """A stretch of a sequence's text.

    Attributes:
        answer: it belongs to an answer, whose pieces stand together.
        supervised: the loss counts it where it counts answers.
        untrained: its row says that the loss does not count it, whatever else it counts.
        begins: it takes the tokenizer's begin token.
        ends: it takes the tokenizer's end token.
        control: its text is special tokens, whatever the template.
        pictures: of each picture that it shows the token of its places, and how many there are.
    """

    text: str
    answer: bool = False
    supervised: bool = False
    untrained: bool = False
    begins: bool = False
    ends: bool = False
    control: bool = False
    pictures: tuple[tuple[int, int], ...] = ()


def last_answer(pieces: Sequence[Piece]) -> int:
    """Where the pieces of the last answer begin."""
    first = len(pieces)
    while first and pieces[first - 1].answer:
        first -= 1
    return first


def plain_pieces(example: Example) -> list[Piece]:
    """Turns joined by newlines; one space before an answer, unless white space stands there already.

    Raises:
        DataError: the row has tools or reasoning, which only a chat template knows how to write.
    """
    if example.tools is not None or any(turn.calls or turn.role == "tool" for turn in example.turns):
        raise DataError(
            f"{where(example.file, example.row)}: tools and their calls are written by a chat template, and there is "
            "none (data.template: plain, or a tokenizer without a chat template)"
        )
    if any(turn.reasoning for turn in example.turns):
        raise DataError(
            f"{where(example.file, example.row)}: reasoning is written by a chat template, and there is none "
            "(data.template: plain, or a tokenizer without a chat template); data.reasoning=drop leaves it out"
        )
    pieces: list[Piece] = []
    before = ""
    for turn in example.turns:
        if turn.role == "assistant":
            pieces.append(Piece(before, begins=not pieces))
            gap = "" if before[-1:].isspace() else " "
            pieces.append(answer_piece(gap + turn.content, turn, ends=True))
            before = "\n"
        else:
            joint = "\n" if before.strip() else ""
            before += joint + turn.content
    return pieces


def answer_piece(text: str, turn: Turn, supervised: bool = True, ends: bool = False) -> Piece:
    """A piece of an answer, which is supervised where its turn is trained."""
    return Piece(text, answer=True, supervised=supervised and turn.trained, untrained=not turn.trained, ends=ends)
