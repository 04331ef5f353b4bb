"""Rows and batches: tokenised examples as methods see them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from holdfast.models.pictures import HIGHEST_PLACE

if TYPE_CHECKING:
    from torch import Tensor

IGNORED = -100
"""The label of a token that is not supervised."""

TokenRow = Mapping[str, Any]
"""A tokenised row: ``input_ids`` and ``labels``, lists of int; -100 where a token is not supervised.

A row of a sequence-to-sequence model also has ``encoder_ids``, the prompt; the others are then the decoder's
(:mod:`holdfast.models.seq2seq`).
"""

Batch = dict[str, Any]
"""Collated rows: ``input_ids``, ``attention_mask``, ``labels``, int64 tensors [batch, seq], on the model's device; of a
sequence-to-sequence model also ``encoder_ids`` and ``encoder_mask``, [batch, prompt]."""

TOKENS = ("input_ids", "labels", "encoder_ids")
"""The columns of a row that hold tokens; the last one is a sequence-to-sequence model's alone."""

INPUTS = ("input_ids", "attention_mask", "position_ids", "encoder_ids", "encoder_mask")
"""What a forward pass without labels takes of a batch."""


def bare(row: TokenRow) -> dict[str, list[int]]:
    """The row without further columns."""
    return {key: list(row[key]) for key in TOKENS if key in row}


def row_length(row: TokenRow) -> int:
    """The tokens of a row, prompt and answer."""
    return len(row["input_ids"]) + len(row.get("encoder_ids", ()))


def model_inputs(batch: Mapping[str, Any]) -> Batch:
    """A batch without labels and other columns."""
    return {key: batch[key] for key in INPUTS if key in batch}


def prompt(row: Mapping[str, Any]) -> list[int]:
    """The tokens of a row before its answer; all tokens of a text, whose first or second token is supervised."""
    if "encoder_ids" in row:
        return list(row["encoder_ids"])
    labels = row.get("labels", ())
    first = next((place for place, label in enumerate(labels) if label != IGNORED), len(row["input_ids"]))
    return list(row["input_ids"][:first] if first > 1 else row["input_ids"])


def count_supervised(row: TokenRow) -> int:
    """How many tokens of a row are supervised; the first one never is, since nothing predicts it."""
    return sum(label != IGNORED for label in row["labels"][1:])


def token_rows(batch: Batch) -> list[TokenRow]:
    """The rows of a batch without padding."""
    parts = zip(batch["input_ids"], batch["labels"], token_mask(batch).bool(), strict=True)
    return [{"input_ids": ids[real].tolist(), "labels": labels[real].tolist()} for ids, labels, real in parts]


def last_answer(row: TokenRow) -> tuple[list[int], list[int]]:
    """A row's last answer, which is its last run of supervised tokens, and all tokens before it.

    Returns:
        (the tokens before the answer, those of the answer); both are empty where no token is supervised.
    """
    ids, labels = list(row["input_ids"]), list(row["labels"])
    end = max((place for place, label in enumerate(labels) if label != IGNORED), default=-1) + 1
    start = max((place for place in range(end) if labels[place] == IGNORED), default=-1) + 1
    return ids[:start], ids[start:end]


def learned(batch: Batch) -> int:
    """The number of the task's own rows in a batch, which come first: 0 if no token in it is supervised."""
    return len(batch["input_ids"]) if bool((batch["labels"] != IGNORED).any()) else 0


def token_mask(batch: Batch) -> Tensor:
    """Which tokens of a batch are not padding: [batch, seq], not zero where a token counts.

    All count where the batch has no mask, or one of four dimensions, which keeps packed rows apart.
    """
    mask, ids = batch.get("attention_mask"), batch["input_ids"]
    return mask if mask is not None and mask.dim() == 2 else ids.new_ones(ids.shape)


def text_mask(batch: Batch) -> Tensor:
    """Which tokens of a batch are text, and not padding or places of pictures: [batch, seq], not zero where one is."""
    text: Tensor = token_mask(batch) * (batch["input_ids"] > HIGHEST_PLACE)
    return text
