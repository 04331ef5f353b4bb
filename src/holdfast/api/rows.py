"""Rows and batches: tokenised examples as methods see them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

IGNORED = -100
"""The label of a token that is not supervised."""

TokenRow = Mapping[str, Any]
"""A tokenised row: ``input_ids`` and ``labels``, lists of int; -100 where a token is not supervised."""

Batch = dict[str, Any]
"""Collated rows: ``input_ids``, ``attention_mask``, ``labels``, int64 tensors [batch, seq], on the model's device."""


def prompt(row: Mapping[str, Any]) -> list[int]:
    """The tokens of a row before its answer; all tokens of a text, whose first or second token is supervised."""
    labels = row.get("labels", ())
    first = next((place for place, label in enumerate(labels) if label != IGNORED), len(row["input_ids"]))
    return list(row["input_ids"][:first] if first > 1 else row["input_ids"])


def count_supervised(row: TokenRow) -> int:
    """How many tokens of a row are supervised; the first one never is, since nothing predicts it."""
    return sum(label != IGNORED for label in row["labels"][1:])


def learned(batch: Batch) -> int:
    """The number of the task's own rows in a batch, which come first: 0 if no token in it is supervised."""
    return len(batch["input_ids"]) if bool((batch["labels"] != IGNORED).any()) else 0


def token_mask(batch: Batch) -> Tensor:
    """Which tokens of a batch are not padding: [batch, seq], not zero where a token counts.

    All count where the batch has no mask, or one of four dimensions, which keeps packed rows apart.
    """
    mask, ids = batch.get("attention_mask"), batch["input_ids"]
    return mask if mask is not None and mask.dim() == 2 else ids.new_ones(ids.shape)
