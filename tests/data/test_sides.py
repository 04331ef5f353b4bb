"""Every prompt stays on its side, whatever the months' sizes and splits, and no later train row is an earlier test."""

from __future__ import annotations

import random

import pytest

from holdfast.api.task import Example, Turn
from holdfast.config.stream import TaskConfig
from holdfast.data.given import Given, GivenRow, hashes
from holdfast.data.sides import LEAST, MOST, Divided, divide
from holdfast.errors import DataError


def row(prompt: str, answer: str = "yes") -> GivenRow:
    example = Example("file", 0, turns=(Turn("user", prompt), Turn("assistant", answer)))
    return GivenRow({"prompt": prompt, "answer": answer}, example, *hashes(example, "prompt_answer"))


def given(**splits: list[GivenRow]) -> Given:
    return Given("month", TaskConfig(name="month", path="x"), splits)


class Months:
    """Data of several months, each divided with what the earlier ones left."""

    def __init__(self) -> None:
        self.sides: dict[str, str] = {}
        self.learned: set[str] = set()

    def add(self, share: float = 0.1, **splits: list[GivenRow]) -> Divided:
        divided = divide(given(**splits), self.sides, self.learned, share)
        for side in ("train", "test"):
            for one in getattr(divided, side):
                assert self.sides.setdefault(one.prompt, side) == side
                self.learned.add(one.id)
        return divided


@pytest.mark.parametrize(
    ("rows", "held_out"), [(2, 1), (3, 1), (10, 5), (30, 15), (60, LEAST), (1000, 100), (9000, MOST)]
)
def test_a_share_is_held_out_within_its_bounds_and_no_more_than_half(rows: int, held_out: int):
    divided = Months().add(all=[row(f"question {i}") for i in range(rows)])
    assert (len(divided.test), len(divided.train)) == (held_out, rows - held_out)


def test_a_prompt_stays_on_its_side_for_years():
    """Months of very different sizes draw from the same prompts, some with a test split of their own."""
    chance, months = random.Random(0), Months()
    tested: set[str] = set()
    for month in range(24):
        rows = [
            row(f"  question {chance.randrange(400)} ", f"answer {month}") for _ in range(chance.choice([8, 60, 300]))
        ]
        half = len(rows) // 2
        try:
            divided = months.add(train=rows[:half], test=rows[half:]) if month % 3 == 2 else months.add(all=rows)
        except DataError:  # nothing new is asked
            continue
        assert not tested & {one.prompt for one in divided.train}
        tested |= {one.prompt for one in divided.test}
        assert not tested & {one.prompt for one in divided.train}


def test_white_space_does_not_bring_a_prompt_to_the_other_side():
    assert row("what  is\nit?").prompt == row(" what is it? ").prompt
    assert row("what is it?").id != row("what  is it?").id


def test_the_order_of_rows_and_the_other_rows_do_not_decide_first():
    rows = [row(f"question {i}") for i in range(400)]
    months = [Months().add(all=part) for part in (rows, rows[::-1])]
    assert {one.prompt for one in months[0].test} == {one.prompt for one in months[1].test}


def test_rows_that_were_learned_are_left_out_and_new_ones_divided():
    months = Months()
    rows = [row(f"question {i}") for i in range(100)]
    months.add(all=rows)
    divided = months.add(all=[*rows, *(row(f"further {i}") for i in range(30))])
    assert (len(divided.train), len(divided.test), divided.known) == (15, 15, 100)
    again = months.add(all=rows)
    assert (again.train, again.test, again.known) == ([], [], 100)


def test_a_train_split_alone_is_divided_like_data_without_splits():
    rows = [row(f"question {i}") for i in range(30)]
    divided = [Months().add(**{split: rows}) for split in ("train", "all")]
    assert divided[0] == divided[1] and len(divided[0].test) == 15


def test_a_single_new_row_is_tested_with_what_was_held_out_of_its_file():
    months = Months()
    rows = [row(f"question {i}") for i in range(40)]
    first = months.add(all=rows)
    divided = months.add(all=[*rows, row("one more")])
    assert [one.values["prompt"] for one in divided.train] == ["one more"]
    assert [one.id for one in divided.test] == [one.id for one in first.test]


def test_a_test_split_of_their_own_is_told_where_it_does_not_fit_the_earlier_sides():
    months = Months()
    first = months.add(all=[row(f"question {i}") for i in range(60)])
    train = [row(one.values["prompt"], "no") for one in first.test[:3]] + [row("new"), row("asked twice")]
    test = [row(one.values["prompt"], "no") for one in first.train[:4]] + [row("asked twice"), row("newer")]
    divided = months.add(train=train, test=test)
    assert [one.values["prompt"] for one in divided.train] == ["new"]
    assert [one.values["prompt"] for one in divided.test] == ["asked twice", "newer"]
    told = "; ".join(divided.notes)
    assert "4 rows of its test split ask what was learned before" in told
    assert "3 rows to learn ask what stands in an earlier test" in told
    assert "1 row to learn ask what stands in its test split" in told


def test_a_validation_split_stands_in_for_a_test_split():
    assert [one.values["prompt"] for one in Months().add(train=[row("a")], eval=[row("b")]).test] == ["b"]
    both = Months().add(train=[row("a")], eval=[row("b")], test=[row("c")])
    assert [one.values["prompt"] for one in both.test] == ["c"]
    assert "validation rows are not used" in both.notes[0]


@pytest.mark.parametrize("rows", [[row("a")], [row("a", "1"), row("a", "2")]], ids=["one row", "one prompt"])
def test_what_cannot_be_divided_is_refused(rows: list[GivenRow]):
    with pytest.raises(DataError, match="too few to hold a test out of"):
        Months().add(all=rows)


def test_rows_that_only_ask_what_is_tested_are_refused():
    months = Months()
    first = months.add(all=[row(f"question {i}") for i in range(40)])
    with pytest.raises(DataError, match="nothing is left to learn"):
        months.add(all=[row(one.values["prompt"], "no") for one in first.test])
