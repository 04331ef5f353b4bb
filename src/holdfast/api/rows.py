"""Rows and batches: tokenised examples as methods see them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

IGNORED = -100


TokenRow = Mapping[str, Any]
"""One tokenised row: ``input_ids`` and ``labels``, lists of int; -100 where a token is not supervised."""

Batch = dict[str, Any]
"""Collated rows: ``input_ids``, ``attention_mask``, ``labels``, int64 tensors [batch, seq], on the model's device."""


def prompt(row: Mapping[str, Any]) -> list[int]:
    """The tokens of a row that come before its answer; of a text, whose first or second token is supervised already,
    all tokens."""
    labels = row.get("labels", ())
    first = next((place for place, label in enumerate(labels) if label != -100), len(row["input_ids"]))
    return list(row["input_ids"][:first] if first > 1 else row["input_ids"])


def learned(batch: Batch) -> int:
    """How many of a batch's rows, from the front, are the task's own: none, where nothing in it is supervised."""
    return len(batch["input_ids"]) if bool((batch["labels"] != -100).any()) else 0
