"""Batches are full and no larger than they may be; sequences that begin alike are beside each other."""

from __future__ import annotations

import itertools
import random

import pytest

from holdfast.models.batches import MOST, Size, by_tokens
from holdfast.models.beginnings import SAVED, alike


def padded(batch: list[int], sizes: list[Size]) -> int:
    parts = [sizes[i] for i in batch]
    return sum(s.rows for s in parts) * (max(s.begun for s in parts) + max(s.rest for s in parts))


@pytest.mark.parametrize("batch_size", [1, 4, 32])
def test_a_batch_takes_no_more_than_so_many_of_the_longest_and_no_next_item_would_fit(batch_size):
    chance = random.Random(batch_size)
    sizes = [Size(chance.randint(1, 3), chance.choice((0, 0, 9)), chance.randint(1, 60)) for _ in range(200)]
    order = sorted(range(200), key=lambda i: -sizes[i].begun - sizes[i].rest)
    batches = by_tokens(order, sizes, batch_size)
    assert [i for batch in batches for i in batch] == order
    most = batch_size * max(s.begun + s.rest for s in sizes)
    for batch, after in zip(batches, [*batches[1:], []], strict=True):
        assert len(batch) == 1 or padded(batch, sizes) <= most
        assert len(batch) == 1 or sum(sizes[i].rows for i in batch) <= MOST * batch_size
        assert len({bool(sizes[i].begun) for i in batch}) == 1
        if after and bool(sizes[after[0]].begun) == bool(sizes[batch[0]].begun):
            longer = [*batch, after[0]]
            assert padded(longer, sizes) > most or sum(sizes[i].rows for i in longer) > MOST * batch_size


def test_nothing_is_in_no_batch():
    assert by_tokens([], [], 8) == []


def test_sequences_that_begin_alike_are_beside_each_other():
    chance = random.Random(0)

    def tokens(count: int) -> list[int]:
        return [chance.randrange(1000) for _ in range(count)]

    begin = tokens(30)
    subjects = [begin + tokens(70), begin + tokens(90)]
    rows = [(subject, subjects[subject] + tokens(chance.randint(1, 20))) for subject in (0, 1) for _ in range(10)]
    rows += [(2, begin + tokens(chance.randint(100, 200))) for _ in range(12)]
    chance.shuffle(rows)
    sequences = [row for _, row in rows]
    order, common = alike(sequences, [*map(len, sequences)])
    assert [common[i] for i in range(len(rows))] == [(100, 120, 30)[subject] for subject, _ in rows]
    assert sorted(order) == [*range(len(rows))]
    groups = [[len(sequences[i]) for i in group] for _, group in itertools.groupby(order, lambda i: rows[i][0])]
    assert len(groups) == 3, "each is in one piece"
    assert all(group == sorted(group, reverse=True) for group in groups)
    assert [group[0] for group in groups] == sorted((group[0] for group in groups), reverse=True)


def test_a_sequence_is_never_all_beginning_and_little_is_not_saved():
    order, common = alike([[1] * 100] * 4 + [[1] * 90], [100] * 4 + [90])
    assert common == [89] * 5 and order[-1] == 4
    few = [[7] * (SAVED // 2 - 1) + [i] for i in range(3)]
    assert alike(few, [*map(len, few)])[1] == [0] * 3
