"""Examples with pictures to tokens: what the model's processor writes for a picture stands in the text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from typing import TYPE_CHECKING, Any

from holdfast.api.rows import IGNORED
from holdfast.api.task import PICTURE, Example
from holdfast.data.encode import Encoder
from holdfast.data.files import where
from holdfast.data.pieces import Piece
from holdfast.errors import DataError
from holdfast.models.pictures import Picture, is_place, pictures_in, place_token
from holdfast.models.sight import Sight

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class SeeingEncoder(Encoder):
    """Turns examples into rows of a model that sees.

    The tokens are those of the model's processor for the same text and pictures; at each place of a picture stands its
    own number (:mod:`holdfast.models.pictures`). No truncation cuts them, and no label is one of them.
    """

    sight: Sight

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, sight: Sight, **options: Any):
        super().__init__(tokenizer, **options)
        self.sight = sight

    def shown(self, ids: Sequence[int]) -> str:
        """As :meth:`Encoder.shown`; in the places of a picture stand its name, its size and how many tokens it has."""
        parts: list[str] = []
        for number, group in groupby(ids, key=lambda token: token if is_place(token) else 0):
            tokens = list(group)
            if not number:
                parts.append(super().shown(tokens))
                continue
            [picture] = pictures_in(tokens)
            count = f"{len(tokens)} token{'s' * (len(tokens) > 1)}"
            parts.append(f"<{picture.name} {picture.width}x{picture.height}, {count}>")
        return "".join(parts)

    def _pieces(self, example: Example) -> list[list[Piece]]:
        if example.text is not None:
            if self.chat and self.sight.image_token in example.text:
                raise DataError(self._no_text(example))
            return super()._pieces(example)
        pictures = [picture for turn in example.turns for picture in turn.pictures]
        return [self._shown(example, pieces, pictures) for pieces in super()._pieces(example)]

    def _shown(self, example: Example, pieces: Sequence[Piece], pictures: Sequence[Picture]) -> list[Piece]:
        """The pieces of a sequence with what the processor writes for the pictures in it.

        Args:
            pictures: of the whole example, of which the sequence may show the first ones alone.
        """
        mark = self.sight.placeholder if self.chat else PICTURE
        count = sum(piece.text.count(mark) for piece in pieces if not piece.answer)
        if count > len(pictures) or any(mark in piece.text for piece in pieces if piece.answer):
            raise DataError(
                f"{where(example.file, example.row)}: its text has {mark!r} in it, for which the row has no picture"
            )
        written = self._written(example, pictures[:count]) if count else ()
        places = [
            (place_token(picture, order), self.sight.places(text))
            for order, (picture, text) in enumerate(zip(pictures, written, strict=False))
        ]
        shown: list[Piece] = []
        done = 0
        for piece in pieces:
            texts = piece.text.split(mark)
            own = slice(done, done + len(texts) - 1)
            done = own.stop
            if len(texts) == 1:
                shown.append(piece)
            elif self.chat:
                mixed = [part for pair in zip(texts, [*written[own], ""], strict=True) for part in pair]
                shown.append(replace(piece, text="".join(mixed), pictures=tuple(places[own])))
            else:
                shown += _parted(piece, texts, written[own], places[own])
        known = sum(number for _, number in places)
        if self.chat and sum(self.sight.places(piece.text) for piece in shown) != known:
            raise DataError(self._no_text(example))
        return shown

    def _no_text(self, example: Example) -> str:
        return (
            f"{where(example.file, example.row)}: its text has {self.sight.image_token!r} in it, which stands for a "
            "part of a picture; data.template=plain keeps it text"
        )

    def _written(self, example: Example, pictures: Sequence[Picture]) -> tuple[str, ...]:
        """What the model's processor writes for pictures; DataError where it takes none of such a size."""
        try:
            return self.sight.written(tuple(picture.size for picture in pictures))
        except (ValueError, ZeroDivisionError) as error:
            sizes = ", ".join(f"{picture.name} {picture.width}x{picture.height}" for picture in pictures)
            raise DataError(
                f"{where(example.file, example.row)}: the model's processor does not take its pictures ({sizes}): "
                f"{error}"
            ) from None

    def _joined(self, pieces: Sequence[Piece], parts: Sequence[list[int]]) -> tuple[list[int], list[int]]:
        ids, labels = super()._joined(
            pieces, [self._placed(piece, part) for piece, part in zip(pieces, parts, strict=True)]
        )
        return ids, [IGNORED if is_place(token) else label for token, label in zip(ids, labels, strict=True)]

    def _placed(self, piece: Piece, part: list[int]) -> list[int]:
        """A piece's tokens, with its pictures' numbers in their places."""
        numbers = [number for number, count in piece.pictures for _ in range(count)]
        if not numbers:
            return part
        left = iter(numbers)
        return [next(left) if token == self.sight.image_token_id else token for token in part]


def _parted(
    piece: Piece, texts: Sequence[str], written: Sequence[str], places: Sequence[tuple[int, int]]
) -> list[Piece]:
    """A piece as one piece a text and a picture, so that a text's own signs stay text."""
    parts: list[Piece] = []
    for number, text in enumerate(texts):
        if number:
            parts.append(Piece(written[number - 1], control=True, pictures=(places[number - 1],)))
        first, last = number == 0, number == len(texts) - 1
        parts.append(replace(piece, text=text, begins=piece.begins and first, ends=piece.ends and last))
    return parts
