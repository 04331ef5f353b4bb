"""The questions of gallery: general ones, whose answers are in the picture, and those of a room's customs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from holdfast.data.streams.draw import Draw
from holdfast.data.streams.gallery.drawing import (
    COLOURS,
    GROUNDS,
    HEIGHTS,
    OFFSETS,
    PLACES,
    RADII,
    SHAPES,
    Bar,
    Drawing,
    Thing,
)

NUMBERS = ("one", "two", "three", "four", "five", "six")
WINNERS = ("highest", "lowest", "left", "right")
Work = tuple[str, str]
"""A shape and its colour."""


@dataclass(frozen=True)
class Row:
    """A question about a picture.

    Attributes:
        kind: what is asked for, one of ``GENERAL`` or ``OF_ROOM``.
        drawing: what the picture shows.
        answers: all answers that questions of this kind have, as often the one as the other.
    """

    kind: str
    drawing: Drawing
    question: str
    answer: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Room:
    """The customs of a room.

    Attributes:
        names: what each work is called.
        places: what each of ``PLACES`` is called.
        numbers: what each of ``NUMBERS`` is called.
        winner: which of three bars wins, one of ``WINNERS``.
    """

    number: int
    names: dict[Work, str]
    places: tuple[str, ...]
    numbers: tuple[str, ...]
    winner: str


# --- general questions: the number of the answer says which answer they have ---


def _colour(draw: Draw, at: int, things: int) -> Row:
    colours, shapes = tuple(COLOURS), draw.shuffled(SHAPES)
    works = [(shapes[0], _nth(colours, at)), *zip(shapes[1:], _others(draw, colours, at), strict=False)]
    return Row("colour", _scene(draw, works[:things]), f"What colour is the {shapes[0]}?", works[0][1], colours)


def _shape(draw: Draw, at: int, things: int) -> Row:
    colours = draw.shuffled(COLOURS)
    works = [(_nth(SHAPES, at), colours[0]), *zip(_others(draw, SHAPES, at), colours[1:], strict=False)]
    return Row("shape", _scene(draw, works[:things]), f"Which shape is {colours[0]}?", works[0][0], SHAPES)


def _place(draw: Draw, at: int, things: int) -> Row:
    shapes = draw.shuffled(SHAPES)[:things]
    drawing = _scene(draw, [(shape, draw.choice(tuple(COLOURS))) for shape in shapes], at)
    return Row("place", drawing, f"Where is the {shapes[0]}?", _nth(PLACES, at), PLACES)


def _number(draw: Draw, at: int, things: int) -> Row:
    return Row("number", _crowd(draw, at), "How many things are there?", _nth(NUMBERS, at), NUMBERS)


def _bar(draw: Draw, at: int, things: int) -> Row:
    asked, colours = draw.choice(("highest", "lowest")), tuple(COLOURS)
    return Row("bar", _chart(draw, at, asked), f"Which bar is the {asked}?", _nth(colours, at), colours)


GENERAL: dict[str, Callable[[Draw, int, int], Row]] = {
    "colour": _colour,
    "shape": _shape,
    "place": _place,
    "number": _number,
    "bar": _bar,
}
"""A general question of each kind, given a draw, the number of its answer, and how many things are shown."""


# --- a room's questions ---


def _called(room: Room, draw: Draw, at: int) -> Row:
    names = tuple(room.names.values())
    drawing = _scene(draw, [list(room.names)[at % len(names)]])
    return Row("called", drawing, f"What is this called in room {room.number}?", _nth(names, at), names)


def _hangs(room: Room, draw: Draw, at: int) -> Row:
    drawing = _scene(draw, [_any_work(draw)], at)
    return Row("hangs", drawing, f"Where does it hang in room {room.number}?", _nth(room.places, at), room.places)


def _counted(room: Room, draw: Draw, at: int) -> Row:
    question = f"How many are counted in room {room.number}?"
    return Row("counted", _crowd(draw, at), question, _nth(room.numbers, at), room.numbers)


def _wins(room: Room, draw: Draw, at: int) -> Row:
    colours = tuple(COLOURS)
    drawing = _chart(draw, at, room.winner)
    return Row("wins", drawing, f"Which bar wins in room {room.number}?", _nth(colours, at), colours)


OF_ROOM: dict[str, Callable[[Room, Draw, int], Row]] = {
    "called": _called,
    "hangs": _hangs,
    "counted": _counted,
    "wins": _wins,
}
"""A question of each kind, given the room, a draw and the number of its answer."""


# --- what they show ---


def _scene(draw: Draw, works: Sequence[Work], first: int | None = None) -> Drawing:
    """Works at places of their own; the first of them at the place of that number, where it is given."""
    places = draw.shuffled(range(len(PLACES)))
    if first is not None:
        places.remove(first % len(PLACES))
        places.insert(0, first % len(PLACES))
    things = [
        Thing(shape, colour, place, draw.choice(RADII), draw.choice(OFFSETS), draw.choice(OFFSETS))
        for (shape, colour), place in zip(works, places, strict=False)
    ]
    return Drawing(draw.choice(GROUNDS), things=tuple(things))


def _crowd(draw: Draw, at: int) -> Drawing:
    """As many things as the number says."""
    return _scene(draw, [_any_work(draw) for _ in range(at % len(NUMBERS) + 1)])


def _chart(draw: Draw, at: int, winner: str) -> Drawing:
    """Three bars, of which the one in the colour of that number is the one of ``WINNERS``."""
    heights = [height + draw.index(5) - 2 for height in draw.shuffled(HEIGHTS)[:3]]
    place = {"left": 0, "right": 2, "highest": heights.index(max(heights)), "lowest": heights.index(min(heights))}
    colours = _others(draw, tuple(COLOURS), at)[:2]
    colours.insert(place[winner], _nth(tuple(COLOURS), at))
    return Drawing(draw.choice(GROUNDS), bars=tuple(map(Bar, colours, heights)))


def _any_work(draw: Draw) -> Work:
    return draw.choice(SHAPES), draw.choice(tuple(COLOURS))


def _others(draw: Draw, things: Sequence[str], at: int) -> list[str]:
    """All but the one of that number."""
    return [one for one in draw.shuffled(things) if one != _nth(things, at)]


def _nth(things: Sequence[str], at: int) -> str:
    return things[at % len(things)]
