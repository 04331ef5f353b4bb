"""The built-in stream of pictures: its answers are in the pictures or the customs, its splits share no picture."""

import hashlib
import io
import itertools
import math
import os
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from holdfast.api.task import PICTURE
from holdfast.data.streams.gallery.drawing import COLOURS, GROUNDS, PLACES, SHAPES, SIDE, Bar, Drawing, Thing
from holdfast.data.streams.gallery.questions import GENERAL, NUMBERS, OF_ROOM
from holdfast.data.streams.gallery.stream import customs, gallery, general_questions, general_rows, room_rows
from holdfast.errors import ConfigError

SPLITS = ("train", "eval", "test")


@pytest.fixture(scope="module")
def rooms():
    return room_rows(60, 4, seed=0)


def every(rooms):
    return [row for splits in rooms.values() for rows in splits.values() for row in rows]


def test_a_room_has_its_rows_of_each_kind(rooms):
    assert list(rooms) == ["room-1", "room-2", "room-3", "room-4"]
    for splits in rooms.values():
        assert {split: Counter(row.kind for row in rows) for split, rows in splits.items()} == {
            split: dict.fromkeys(OF_ROOM, count) for split, count in zip(SPLITS, (60, 15, 30), strict=True)
        }


@pytest.mark.parametrize("seed", [0, 1])
def test_no_picture_stands_in_two_splits_of_any_room_or_of_general_questions(seed):
    made = room_rows(60, 4, seed)
    shown = {
        split: {
            row.drawing.pixels().tobytes()
            for rows in (*(splits[split] for splits in made.values()), general_rows(60, split, seed))
            for row in rows
        }
        for split in SPLITS
    }
    for one, other in itertools.combinations(SPLITS, 2):
        assert not shown[one] & shown[other]


def test_no_row_stands_twice(rooms):
    rows = every(rooms) + general_rows(100)
    assert len({(row.drawing.pixels().tobytes(), row.question) for row in rows}) == len(rows)


def test_who_sees_no_picture_guesses_at_chance(rooms):
    """Guess each test row's answer as the one that its question has most often among train rows."""
    for splits in rooms.values():
        for kind, (right, chance, count) in _guessed(splits["train"], splits["test"]).items():
            assert right <= math.ceil(chance * count) / count, kind
    for kind, (right, chance, count) in _guessed(general_rows(200), general_rows(200, "test")).items():
        assert right <= chance + 3 * math.sqrt(chance / count), kind


def _guessed(train, test):
    answers = {}
    for row in train:
        answers.setdefault(row.question, Counter())[row.answer] += 1
    guessed = {}
    for kind in {row.kind for row in test}:
        asked = [row for row in test if row.kind == kind]
        right = sum(answers[row.question].most_common(1)[0][0] == row.answer for row in asked)
        guessed[kind] = right / len(asked), 1 / len(asked[0].answers), len(asked)
    return guessed


def test_answers_are_what_the_pictures_show():
    shown = {"place": lambda thing: PLACES[thing.place]}
    for row in general_rows(40) + general_rows(40, "test", things=(3,)):
        things, bars = row.drawing.things, row.drawing.bars
        assert row.kind in GENERAL and row.answer in row.answers
        if row.kind == "number":
            assert NUMBERS[len(things) - 1] == row.answer
        elif row.kind == "bar":
            best = (max if "highest" in row.question else min)(bars, key=lambda bar: bar.height)
            assert best.colour == row.answer and len({bar.height for bar in bars}) == len(bars) == 3
        else:
            asked = [thing for thing in things if row.question.rstrip("?").split()[-1] in (thing.shape, thing.colour)]
            assert len(asked) == 1
            assert shown.get(row.kind, lambda thing, kind=row.kind: getattr(thing, kind))(asked[0]) == row.answer


def test_answers_of_a_room_follow_its_customs(rooms):
    for room, splits in zip(customs(rooms=4), rooms.values(), strict=True):
        for row in itertools.chain(*splits.values()):
            assert f"in room {room.number}?" in row.question
            things, bars = row.drawing.things, row.drawing.bars
            assert (
                row.answer
                == {
                    "called": lambda room=room, things=things: room.names[things[0].shape, things[0].colour],
                    "hangs": lambda room=room, things=things: room.places[things[0].place],
                    "counted": lambda room=room, things=things: room.numbers[len(things) - 1],
                    "wins": lambda room=room, bars=bars: _winner(bars, room.winner),
                }[row.kind]()
            )


def _winner(bars, by):
    heights = sorted(bars, key=lambda bar: bar.height)
    return {"left": bars[0], "right": bars[-1], "lowest": heights[0], "highest": heights[-1]}[by].colour


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_customs_change_from_room_to_room_but_a_sixth_of_the_words(seed):
    made = customs(rooms=6, seed=seed)
    for before, after in itertools.pairwise(made):
        assert list(before.names) == list(after.names)
        assert before.winner != after.winner
        for words in ("places", "numbers"):
            assert _same(getattr(before, words), getattr(after, words)) == [0]
        assert _same(before.names.values(), after.names.values()) == [0, 1]
    for room in made:
        words = [*room.names.values(), *room.places, *room.numbers]
        assert len(set(words)) == len(words) == 12 + 9 + 6


def _same(before, after):
    return [number for number, (a, b) in enumerate(zip(before, after, strict=True)) if a == b]


def test_general_answers_are_no_words_of_a_room(rooms):
    general = {row.answer for row in general_rows(60)}
    assert not general & {row.answer for row in every(rooms) if row.kind != "wins"}


def test_things_stand_within_their_places_and_look_different():
    masks = set()
    for shape in SHAPES:
        for radius, across, down in itertools.product((5, 6), (-1, 0, 1), (-1, 0, 1)):
            pixels = Drawing(GROUNDS[0], (Thing(shape, "red", 4, radius, across, down),)).pixels()
            covered = (pixels == COLOURS["red"]).all(-1)
            assert covered[16:32, 16:32].sum() == covered.sum() > 30
            masks.add(covered.tobytes())
    assert len(masks) == len(SHAPES) * 2 * 9


def test_bars_stand_on_the_ground_as_high_as_they_are():
    pixels = Drawing(GROUNDS[0], bars=(Bar("red", 5), Bar("blue", 30), Bar("green", 40))).pixels()
    for column, (colour, height) in enumerate((("red", 5), ("blue", 30), ("green", 40))):
        rows = (pixels[:, 16 * column + 8] == COLOURS[colour]).all(-1)
        assert rows.sum() == height and rows[-height:].all()


def test_a_file_holds_the_pixels_and_nothing_that_depends_on_the_library():
    drawing = general_rows(1)[0].drawing
    file = drawing.file()
    with Image.open(io.BytesIO(file)) as image:
        assert image.size == (SIDE, SIDE) and np.array_equal(np.asarray(image.convert("RGB")), drawing.pixels())
    assert file[-3 * SIDE * SIDE :] == drawing.pixels()[::-1, :, ::-1].tobytes() and len(file) == 54 + 3 * SIDE * SIDE


def test_examples_show_their_picture_before_the_question(rooms):
    stream = gallery(60, 4, seed=0)
    assert [task.name for task in stream.tasks] == list(rooms)
    for task, splits in zip(stream.tasks, rooms.values(), strict=True):
        assert task.metric == "accuracy"
        for examples, rows in zip((task.train, task.eval, task.test), splits.values(), strict=True):
            for example, row in zip(examples, rows, strict=True):
                [picture] = example.pictures
                assert picture.content() == row.drawing.file() and picture.size == (SIDE, SIDE)
                assert (example.question, example.answer) == (f"<image>{row.question}", row.answer)
    assert len({task.fingerprint for task in stream.tasks}) == len(stream.tasks)


@pytest.mark.parametrize("seed", [0, 1])
def test_general_questions_have_one_right_choice_at_any_place(seed):
    measure = general_questions(seed)
    rows = general_rows(30, "test", seed)
    assert len(measure.questions) == len(measure.pictures) == len(rows) == 30 * len(GENERAL)
    for row, (question, choices, right), [picture] in zip(rows, measure.questions, measure.pictures, strict=True):
        assert (question, choices[right]) == (PICTURE + row.question, row.answer)
        assert picture.content() == row.drawing.file()
        assert len(set(choices)) == 4 and set(choices) <= set(row.answers)
        if row.kind == "bar":  # who knows only which colours are there has a third
            assert {bar.colour for bar in row.drawing.bars} <= set(choices)
    places = Counter(right for _, _, right in measure.questions)
    assert min(places.values()) > len(rows) / 8


def test_a_room_does_not_depend_on_later_rooms(rooms):
    short = room_rows(60, 2, seed=0)
    assert short == {name: rooms[name] for name in ("room-1", "room-2")}


def test_options_change_the_content_and_equal_options_do_not():
    one, same, other, longer = (room_rows(size, 1, seed) for size, seed in [(8, 0), (8, 0), (8, 1), (9, 0)])
    assert one == same and one not in (other, longer)


def _digest(rooms, general):
    content = hashlib.sha256()
    for row in every(rooms) + general:
        content.update(row.drawing.file() + f"{row.kind} {row.question} {row.answer} {row.answers}".encode())
    return content.hexdigest()


def test_it_is_gallery_1_on_every_platform():
    digest = _digest(room_rows(12, 2, seed=7), general_rows(6, seed=7))
    assert digest == "3408ef2cc1855ff5313445a418f1bb3c4d7815ffb54ad07f59cb1100cf6f1267", (
        "another gallery needs a new VERSION"
    )


def test_hash_randomisation_changes_nothing():
    code = (
        "from holdfast.data.streams.gallery.stream import *; print(room_rows(5, 2), general_rows(5, things=(1, 2, 3)))"
    )
    command = [sys.executable, "-c", code]
    texts = {
        subprocess.run(
            command, env=os.environ | {"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    assert len(texts) == 1


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"size": 3}, "size"),
        ({"size": 2.5}, "size"),
        ({"size": True}, "size"),
        ({"size": 1001}, "size"),
        ({"rooms": 0}, "rooms"),
        ({"rooms": 21}, "rooms"),
        ({"rooms": "2"}, "rooms"),
        ({"seed": -1}, "seed"),
        ({"seed": "0"}, "seed"),
    ],
)
def test_options_out_of_range_are_refused_by_name(options, key):
    with pytest.raises(ConfigError, match=f"gallery: {key} must be") as error:
        customs(**options)
    assert repr(options[key]) in str(error.value)
