"""Likelihoods of sequences that share beginnings are those of each sequence by itself."""

from __future__ import annotations

import functools
import random

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from holdfast.models.likelihood import token_losses
from support.families import FAMILIES, family_model
from support.tiny import VOCABULARY, tiny_model


def questions(count: int, seed: int = 0, vocabulary: int = VOCABULARY, begun: int = 0) -> list[dict[str, list[int]]]:
    """Questions of different lengths with two to five answers each, some of one token, one with a text alone.

    Args:
        begun: tokens that every question begins with; some then have one answer alone.
    """
    chance = random.Random(seed)

    def tokens(least: int, most: int) -> list[int]:
        return [chance.randrange(3, vocabulary) for _ in range(chance.randint(least, most))]

    rows = []
    begin = tokens(begun, begun)
    for number in range(count):
        asked = begin + tokens(2, 30)
        for _ in range(1 if begun and number % 2 else chance.randint(2, 5)):
            answer = tokens(1, 4)
            rows.append({"input_ids": asked + answer, "labels": [-100] * len(asked) + answer})
    text = tokens(12, 12)
    rows.append({"input_ids": text, "labels": text})
    chance.shuffle(rows)
    return rows


def plain(model, rows):
    """One forward pass a sequence, without padding or cache."""
    found = []
    with torch.no_grad():
        for row in rows:
            logits = model(input_ids=torch.tensor([row["input_ids"]]), use_cache=False).logits[0, :-1]
            labels = torch.tensor(row["labels"][1:])
            found.append(float(F.cross_entropy(logits.double(), labels, reduction="sum")))
    return found


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_they_are_those_of_each_sequence_by_itself(batch_size):
    model, rows = tiny_model().eval(), questions(12)
    done = []
    losses, tokens = token_losses(
        model, rows, batch_size=batch_size, pad_token_id=0, on_batch=lambda n, total: done.append((n, total))
    )
    np.testing.assert_allclose(losses, plain(model, rows), rtol=1e-5)
    assert tokens.tolist() == [sum(label != -100 for label in row["labels"][1:]) for row in rows]
    assert done[-1] == (len(rows), len(rows)) and [n for n, _ in done] == sorted(n for n, _ in done)


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_they_are_so_with_every_family(name):
    model = family_model(name).eval()
    vocabulary = min(VOCABULARY, model.config.get_text_config().vocab_size)
    rows = questions(3, vocabulary=vocabulary) + questions(16, vocabulary=vocabulary, begun=50)
    losses, _ = token_losses(model, rows, batch_size=8, pad_token_id=0)
    np.testing.assert_allclose(losses, plain(model, rows), rtol=2e-4)


def test_a_question_is_read_once_and_the_head_applied_to_its_answers_alone(monkeypatch):
    model = tiny_model().eval()
    asked = list(range(3, 33))
    rows = [{"input_ids": [*asked, a, b], "labels": [-100] * 30 + [a, b]} for a, b in ((4, 5), (6, 7), (8, 9))]
    read, logits = [], []
    forward, head = type(model).forward, model.lm_head.forward

    @functools.wraps(forward)
    def watched(self, *args, **kwargs):
        read.append(kwargs["input_ids"].numel())
        return forward(self, *args, **kwargs)

    def applied(hidden):
        logits.append(hidden.shape[:-1].numel())
        return head(hidden)

    monkeypatch.setattr(type(model), "forward", watched)
    monkeypatch.setattr(model.lm_head, "forward", applied)
    token_losses(model, rows, batch_size=8, pad_token_id=0)
    assert read == [30, 3] and logits == [1, 3]
    read.clear(), logits.clear()
    # a question with answers of one token and of two: the reading of the question gives the former
    mixed = [*rows[:1], *({"input_ids": [*asked, a], "labels": [-100] * 30 + [a]} for a in (4, 9))]
    token_losses(model, mixed, batch_size=8, pad_token_id=0)
    assert read == [30, 1] and logits == [1, 1]
    read.clear(), logits.clear()
    token_losses(model, rows[:1], batch_size=8, pad_token_id=0)
    assert read == [32] and logits == [2, 1, 1]  # the last one also by the model, which shows what its logits are
