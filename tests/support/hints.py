"""A tiny pretrained model that a soft prompt can steer: it answers with the letter that stands before the prompt."""

from __future__ import annotations

import random
from functools import cache
from pathlib import Path
from typing import Any

import torch

from holdfast.rehearsal.pseudo import Writing
from support.tiny import pad_rows, tiny_config, tiny_model, tiny_tokenizer

LETTERS = "abcdefghijklmnopqrstuvwxyz"
WORDS = ("red", "green", "blue")


def tokens(text: str) -> list[int]:
    return tiny_tokenizer()(text, add_special_tokens=False)["input_ids"]


@cache
def hinted_weights(steps: int = 300) -> dict[str, torch.Tensor]:
    """``xxx red: ab?`` is answered by ``x``; and after the mark of a task comes a row of it, as LFPT5 writes them."""
    model = tiny_model(hidden_size=32, intermediate_size=64, num_key_value_heads=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0.1, steps)
    chance = random.Random(0)
    for _ in range(steps):
        batch = pad_rows([hinted_row(chance) for _ in range(16)])
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
        schedule.step()
    return model.state_dict()


def hinted_row(chance: random.Random) -> dict[str, list[int]]:
    letter, word = chance.choice(LETTERS), chance.choice(WORDS)
    before, answer = tokens(f"{word}: {chance.choice(LETTERS)}{chance.choice(LETTERS)}?"), [*tokens(f" {letter}"), 2]
    row = {"input_ids": before + answer, "labels": [-100] * len(before) + answer}
    if chance.random() < 0.4:
        row = Writing.of(tiny_tokenizer(), word).write(row)
    hint = tokens(letter * chance.randrange(1, 9))
    return {"input_ids": hint + row["input_ids"], "labels": [-100] * len(hint) + row["labels"]}


def hinted_model() -> Any:
    model = tiny_model(hidden_size=32, intermediate_size=64, num_key_value_heads=2)
    model.load_state_dict(hinted_weights())
    return model


def hinted_config(folder: Path, method: Any, **changes: Any) -> dict[str, Any]:
    """:func:`tiny.tiny_config` with the hinted model, and the tuner that the method needs unless one is given."""
    config = tiny_config(folder, method=method) | changes
    hinted_model().save_pretrained(folder / "model")
    if "tuner" not in changes:
        del config["tuner"]
    return config
