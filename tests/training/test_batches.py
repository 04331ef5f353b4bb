"""Rows and tokens of micro-batches are counted, and rows that come twice are taken out."""

from __future__ import annotations

import math

import pytest
import torch

from holdfast.engines.process import Process
from holdfast.training.batches import count_rows, count_tokens, drop_repeated_rows, is_token_batch
from support.tiny import pad_rows, tiny_rows


def test_rows_and_tokens_are_counted_in_batches_of_any_kind():
    rows = tiny_rows(5)
    tokens = sum(len(row["input_ids"]) for row in rows)
    assert (count_rows(pad_rows(rows)), count_tokens(pad_rows(rows))) == (5, tokens)
    beside = pad_rows(rows) | {"rehearsal": {"replay": pad_rows(rows[:2])}}
    assert count_tokens(beside) == tokens + sum(len(row["input_ids"]) for row in rows[:2])
    for batch, count in (
        ([{"prompt": "a"}, {"prompt": "b"}], 2),
        ({"x": torch.ones(3, 2), "note": "n"}, 3),
        ({"scale": torch.tensor(1.0)}, 0),
    ):
        assert (count_rows(batch), count_tokens(batch)) == (count, 0)


def test_a_token_batch_has_a_label_for_every_token():
    batch = pad_rows(tiny_rows(3))
    assert is_token_batch(batch)
    assert not is_token_batch(batch | {"labels": torch.tensor([0, 1, 1])})  # classification
    assert not is_token_batch({"input_ids": batch["input_ids"]})  # preferences
    assert not is_token_batch([batch])


@pytest.mark.parametrize(("total", "world", "size", "accumulated"), [(10, 2, 2, 2), (9, 2, 2, 1), (7, 3, 1, 2)])
def test_every_row_of_an_epoch_counts_once(total, world, size, accumulated):
    """accelerate fills up the last batches with rows from the epoch's beginning."""
    micro_batches = math.ceil(total / (world * size))
    counted = 0
    for rank in range(world):
        for first in range(0, micro_batches, accumulated):
            numbers = range(first, min(first + accumulated, micro_batches))
            batches = [pad_rows(tiny_rows(size)) for _ in numbers]
            sizes = drop_repeated_rows(batches, Process(rank, world), first, size, total)
            assert [len(batch["input_ids"]) for batch in batches] == [max(1, n) for n in sizes or [size] * len(batches)]
            for batch, rows in zip(batches, sizes, strict=False):
                assert bool((batch["labels"] != -100).any()) == (rows > 0)
            counted += sum(sizes or [size] * len(batches))
    assert counted == total


def test_repeated_rows_stay_beside_pictures_and_teach_nothing():
    """A batch's pixels do not say which row they belong to: a row may show several pictures, or many patches."""
    batch = pad_rows(tiny_rows(2)) | {"pixel_values": torch.ones(6, 4)}
    batches = [batch]
    assert drop_repeated_rows(batches, Process(1, 2), 0, 2, 3) == [1]
    assert len(batches[0]["input_ids"]) == 2 and len(batches[0]["pixel_values"]) == 6
    assert (batches[0]["labels"] != -100).any(1).tolist() == [True, False]


def test_batches_without_a_label_for_every_token_are_left_as_they_are():
    batches = [{"x": torch.ones(2, 2)}]
    assert drop_repeated_rows(batches, Process(1, 2), 0, 2, 3) == [] and len(batches[0]["x"]) == 2
