"""Batches: padding changes nothing, and packing changes neither the loss nor what a row sees."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from holdfast.data.collate import Collator, concat, pack
from support.tiny import tiny_model, tiny_rows

COLLATE = Collator(pad_token_id=0)


def model(attention: str, **changes: Any) -> Any:
    made = tiny_model(attn_implementation=attention, max_position_embeddings=128, use_cache=False, **changes)
    return made.eval()


def nats(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Sum of the loss over all supervised tokens."""
    labels = batch["labels"][:, 1:]
    inputs = {key: value for key, value in batch.items() if key in ("input_ids", "attention_mask", "position_ids")}
    logits = model(**inputs).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")


def alone(model: Any, rows: list[dict[str, Any]]) -> torch.Tensor:
    """The same, one row at a time without any padding or mask."""
    return torch.stack([nats(model, {key: torch.tensor([row[key]]) for key in row}) for row in rows]).sum()


def test_rows_are_padded_to_the_longest_and_no_further() -> None:
    rows = [
        {"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "row": 3},
        {"input_ids": [8], "labels": [8], "row": 1},
    ]
    batch = Collator(pad_token_id=9)(rows)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 9]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [8, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["row"].tolist() == [3, 1]
    assert {value.dtype for value in batch.values()} == {torch.int64}
    assert "row" not in COLLATE([rows[0], {"input_ids": [1], "labels": [1]}])


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_padding_changes_no_loss(attention: str) -> None:
    rows = tiny_rows(7, length=20)
    net = model(attention)
    torch.testing.assert_close(nats(net, COLLATE(rows)), alone(net, rows), atol=1e-4, rtol=1e-5)


def test_packing_is_first_fit_and_loses_nothing() -> None:
    chance = random.Random(0)
    rows = [
        {"input_ids": ids, "labels": [-100, *ids[1:]], "row": i}
        for i in range(60)
        for ids in [[chance.randrange(3, 60) for _ in range(chance.randrange(2, 21))]]
    ]
    packed = pack(rows, 20)
    room: list[int] = []
    first_fit = []
    for row in rows:
        length = len(row["input_ids"])
        place = next((i for i, left in enumerate(room) if left >= length), None)
        if place is None:
            place = len(room)
            room.append(20)
            first_fit.append(list[int]())
        room[place] -= length
        first_fit[place] += row["input_ids"]
    assert [sequence["input_ids"] for sequence in packed] == first_fit
    for sequence in packed:
        starts = [i for i, position in enumerate(sequence["position_ids"]) if position == 0]
        assert all(sequence["labels"][i] == -100 for i in starts)
        for start, end in zip(starts, [*starts[1:], len(sequence["input_ids"])], strict=True):
            assert sequence["position_ids"][start:end] == list(range(end - start))
    assert sum(len(sequence["input_ids"]) for sequence in packed) == sum(len(row["input_ids"]) for row in rows)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("count", [1, 2, 11])
def test_packing_changes_no_loss(attention: str, count: int) -> None:
    rows = tiny_rows(count, seed=count, length=20)
    net = model(attention)
    packed = pack(rows, 48)
    assert len(packed) < count or count == 1
    batch = COLLATE(packed)
    torch.testing.assert_close(nats(net, batch), alone(net, rows), atol=1e-4, rtol=1e-5)
    tokens = (batch["labels"][:, 1:] != -100).sum()
    assert tokens == sum(label != -100 for row in rows for label in row["labels"][1:])
    torch.testing.assert_close(net(**batch).loss, alone(net, rows) / tokens, atol=1e-5, rtol=0)


def test_packing_changes_no_gradient() -> None:
    rows = tiny_rows(9, length=20)
    net = model("sdpa")
    gradients = []
    for loss in (nats(net, COLLATE(pack(rows, 48))), alone(net, rows)):
        net.zero_grad()
        loss.backward()
        gradients.append(torch.cat([p.grad.flatten().clone() for p in net.parameters()]))
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-4)


def test_batches_are_joined_row_by_row() -> None:
    a, b = tiny_rows(3, seed=1, length=12), tiny_rows(2, seed=2, length=30)
    for one, two in ((a, b), (b, a)):
        joined, whole = concat(COLLATE(one), COLLATE(two), pad_token_id=0), COLLATE(one + two)
        assert joined.keys() == whole.keys()
        assert all(torch.equal(joined[key], whole[key]) for key in whole)


def test_a_key_of_one_batch_only_is_left_out() -> None:
    row = {"input_ids": [1, 2], "labels": [1, 2]}
    joined = concat(COLLATE([row | {"row": 4}]), COLLATE([row]), pad_token_id=0)
    assert set(joined) == {"input_ids", "labels", "attention_mask"}
    both = concat(COLLATE([row | {"row": 4}]), COLLATE([row | {"row": 5}]), pad_token_id=0)
    assert both["row"].tolist() == [4, 5]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_packed_and_an_unpacked_batch_join_without_a_change_of_loss(attention: str) -> None:
    packed, plain = tiny_rows(8, seed=1, length=12), tiny_rows(3, seed=2, length=40)
    net = model(attention)
    expected = alone(net, packed + plain)
    batches = [COLLATE(pack(packed, 30)), COLLATE(plain)]
    for a, b in (batches, batches[::-1]):
        torch.testing.assert_close(nats(net, concat(a, b, pad_token_id=0)), expected, atol=1e-4, rtol=1e-5)
