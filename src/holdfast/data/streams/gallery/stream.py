"""The built-in stream of pictures: rooms of a gallery, each with customs of its own, and general questions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from holdfast.api.task import PICTURE, Example, General, Stream, Task, Turn, fingerprint
from holdfast.data.streams.draw import Draw
from holdfast.data.streams.gallery.drawing import COLOURS, PLACES, SHAPES, Drawing
from holdfast.data.streams.gallery.questions import GENERAL, NUMBERS, OF_ROOM, WINNERS, Room, Row
from holdfast.errors import ConfigError
from holdfast.models.pictures import Picture, look_at

VERSION = "gallery 1"
SIZE, ROOMS = 60, 4
QUESTIONS = 30  # general ones of each kind, with choices

WORKS = 12  # that have a name in every room
LASTING = 6  # of so many names, places and numbers, one is the same in all rooms
SPLITS = {"train": range(7), "eval": range(7, 8), "test": range(8, 10)}
"""The numbers of the pictures (:meth:`Drawing.number`) that each split shows, in all rooms and general questions."""

ONSETS = (
    "b",
    "bl",
    "d",
    "dr",
    "f",
    "fl",
    "g",
    "k",
    "kr",
    "l",
    "m",
    "n",
    "p",
    "pl",
    "r",
    "s",
    "st",
    "t",
    "tr",
    "v",
    "z",
)
VOWELS, LAST_VOWELS = ("a", "e", "i", "o", "u"), ("a", "i", "o", "u")
MIDDLES = ("b", "d", "g", "k", "l", "m", "n", "r", "t", "v", "z")


def gallery(size: int = SIZE, rooms: int = ROOMS, seed: int = 0) -> Stream:
    """Make the stream: a task a room, whose test asks about pictures that no train row of any room shows.

    Args:
        size: train rows of each of a room's four kinds of question; a quarter as many are for eval, half as many for
            test.
        rooms: each is a task. The rows of a room do not depend on later rooms.
        seed: another seed is another gallery.

    Returns:
        Stream "gallery" with metric accuracy, and a measure of general ability, "gallery": questions with four choices
        about colours, shapes, places, numbers and bars, of which no room changes the meaning.

    Raises:
        ConfigError: an option is out of range.
    """
    tasks = []
    for name, splits in room_rows(size, rooms, seed).items():
        train, dev, test = (examples(rows, f"gallery/{name}") for rows in splits.values())
        tasks.append(Task(name, "accuracy", train, test, dev, fingerprint=fingerprint(train, dev, test)))
    return Stream("gallery", tasks, [general_questions(seed)])


def examples(rows: Sequence[Row], file: str) -> list[Example]:
    """Rows as questions that show their picture first.

    Args:
        file: what the rows are said to come from.
    """
    return [
        Example(file, number, (Turn("user", asked, pictures=shown), Turn("assistant", row.answer)))
        for number, row in enumerate(rows)
        for asked, shown in [_asked(row)]
    ]


def general_questions(seed: int = 0) -> General:
    """General questions about test pictures with four choices; wrong ones are in the picture where possible."""
    draw = Draw(VERSION, seed, "choices")
    questions, pictures = [], []
    for row in general_rows(QUESTIONS, "test", seed):
        wrong = draw.shuffled([answer for answer in row.answers if answer != row.answer])
        there = [answer for answer in wrong if answer in row.drawing.words()]
        wrong = [*there, *(answer for answer in wrong if answer not in there)][:3]
        choices = draw.shuffled([row.answer, *wrong])
        asked, shown = _asked(row)
        questions.append((asked, choices, choices.index(row.answer)))
        pictures.append(shown)
    return General("gallery", "choices", questions=questions, pictures=pictures, by="acc_with_end")


def _asked(row: Row) -> tuple[str, tuple[Picture, ...]]:
    """The content of a question, and its picture."""
    return PICTURE + row.question, (look_at(row.drawing.file(), "a picture of gallery"),)


def room_rows(size: int = SIZE, rooms: int = ROOMS, seed: int = 0) -> dict[str, dict[str, list[Row]]]:
    """Make the rows of each room: {"room-1": {"train": rows, "eval": rows, "test": rows}}.

    Args:
        size: train rows of each of the four kinds of question; a quarter as many are for eval, half as many for test.
        rooms: each is a task. The rows of a room do not depend on later rooms.
        seed: another seed is another gallery.

    Raises:
        ConfigError: an option is out of range.
    """
    sizes = {"train": size, "eval": size // 4, "test": size // 2}
    return {
        f"room-{room.number}": {
            split: _rows(
                {kind: partial(ask, room) for kind, ask in OF_ROOM.items()}, split, rows, seed, f"room {room.number}"
            )
            for split, rows in sizes.items()
        }
        for room in customs(size, rooms, seed)
    }


def general_rows(size: int, split: str = "train", seed: int = 0, things: Sequence[int] = (1, 2)) -> list[Row]:
    """Make ``size`` rows of each of the five kinds of general question.

    Args:
        split: whose pictures they are about: train, eval or test. No row of another split, of any room, shows them.
        things: how many things may be in a picture that asks for the colour, the shape or the place of one.
    """

    def asked(ask: Callable[[Draw, int, int], Row], draw: Draw, at: int) -> Row:
        return ask(draw, at, draw.choice(things))

    return _rows(
        {kind: partial(asked, ask) for kind, ask in GENERAL.items()}, split, size, seed, f"general {tuple(things)}"
    )


def customs(size: int = SIZE, rooms: int = ROOMS, seed: int = 0) -> list[Room]:
    """The customs of each room. What is not lasting differs from the room before.

    Raises:
        ConfigError: an option is out of range.
    """
    _check(size, rooms, seed)
    draw = Draw(VERSION, seed, "gallery")
    works = draw.shuffled([(shape, colour) for shape in SHAPES for colour in COLOURS])[:WORKS]
    words = _words(draw, 2 * (WORKS + len(PLACES) + len(NUMBERS)))
    names, places, numbers = words[: 2 * WORKS], words[2 * WORKS : -2 * len(NUMBERS)], words[-2 * len(NUMBERS) :]
    made: list[Room] = []
    for number in range(1, rooms + 1):
        draw = Draw(VERSION, seed, f"customs of room {number}")
        last = made[-1] if made else Room(0, {}, (), (), "")
        room = Room(
            number,
            dict(zip(works, _differing(draw, names, tuple(last.names.values())), strict=True)),
            _differing(draw, places, last.places),
            _differing(draw, numbers, last.numbers),
            draw.choice([winner for winner in WINNERS if winner != last.winner]),
        )
        made.append(room)
    return made


def _differing(draw: Draw, words: Sequence[str], before: tuple[str, ...]) -> tuple[str, ...]:
    """Half of the words; of those before, the first sixth stay, and no other stands again where it stood."""
    kept = before[: len(before) // LASTING]
    rest = [word for word in words if word not in kept]
    while True:
        chosen = draw.shuffled(rest)[: len(words) // 2 - len(kept)]
        if all(new != old for new, old in zip(chosen, before[len(kept) :], strict=False)):
            return (*kept, *chosen)


def _words(draw: Draw, count: int) -> list[str]:
    """Made-up words of two syllables."""
    words: list[str] = []
    while len(words) < count:
        word = "".join(map(draw.choice, (ONSETS, VOWELS, MIDDLES, LAST_VOWELS)))
        if word not in words:
            words.append(word)
    return words


def _rows(kinds: Mapping[str, Callable[[Draw, int], Row]], split: str, size: int, seed: int, purpose: str) -> list[Row]:
    """``size`` different rows of each kind, in any order, whose pictures belong to the split."""
    rows: dict[tuple[Drawing, str], Row] = {}
    for kind, ask in kinds.items():
        draw = Draw(VERSION, seed, f"{purpose}: {kind} of {split}")
        for number in range(size):
            row = ask(draw, number)
            while row.drawing.number() not in SPLITS[split] or (row.drawing, row.question) in rows:
                row = ask(draw, number)
            rows[row.drawing, row.question] = row
    return Draw(VERSION, seed, f"{purpose}: order of {split}").shuffled(rows.values())


def _check(size: int, rooms: int, seed: int) -> None:
    if type(size) is not int or not 4 <= size <= 1000:
        raise ConfigError(f"gallery: size must be a whole number of rows from 4 to 1000, not {size!r}")
    if type(rooms) is not int or not 1 <= rooms <= 20:
        raise ConfigError(f"gallery: rooms must be a whole number from 1 to 20, not {rooms!r}")
    if type(seed) is not int or seed < 0:
        raise ConfigError(f"gallery: seed must be a whole number from 0, not {seed!r}")
