"""FLOW: rows that the model knew before the stage count more, those that surprised it less."""

from __future__ import annotations

import hashlib
import math
import statistics
from collections.abc import Sequence
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from holdfast.api.method import Method
from holdfast.api.rows import IGNORED, Batch
from holdfast.api.stage import Stage, Step
from holdfast.config.section import Section
from holdfast.engines.process import Process
from holdfast.errors import MethodError

Key = bytes
"""A digest of a row's tokens and labels."""


class FLOW(Method):
    """FLOW, fine-tuning with pretrained loss-oriented weighting (Sanyal et al., 2025, arXiv 2502.02797).

    L = mean over rows of w_i f_i(theta), with w_i = exp(- f_i(theta_start) / tau). f_i(theta_start) is the mean loss of
    a row's tokens under the weights that the stage begins with, and tau the median of it over the task's rows. As in
    the plain loss, the sum over tokens is divided by the number of tokens in the step.
    """

    name = "flow"
    reads_all_logits = False

    class Options(Section):
        temperature: float | None = Field(
            None, gt=0, description="tau, in nats; absent: the median of the task's rows, so that one has weight 1/e"
        )

    options: Options

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.weights: dict[Key, float] = {}  # of the task's rows
        self.seen = self.found = False  # whether batches had rows, and some of these were the task's

    @property
    def needs_rows(self) -> bool:
        return True

    def before_stage(self, stage: Stage) -> None:
        rows = list(stage.rows)
        losses = [loss / max(count, 1) for loss, count in zip(*stage.losses(rows), strict=True)]
        tau = self.options.temperature or max(statistics.median(losses), torch.finfo(torch.float32).tiny)
        keys = (row_key(row["input_ids"], row["labels"], row.get("encoder_ids", ())) for row in rows)
        self.weights = {key: math.exp(-loss / tau) for key, loss in zip(keys, losses, strict=True)}
        self.seen = self.found = False

    def loss_weights(self, step: Step, batch: Batch, outputs: Any) -> Tensor | None:
        ids, labels = batch["input_ids"].tolist(), batch["labels"].tolist()
        factors = torch.ones(batch["labels"].shape)
        for number, places in row_places(batch):
            part = [labels[number][place] for place in places]
            prompt = encoder_prompt(batch, number)
            weight = self.weights.get(row_key([ids[number][place] for place in places], part, prompt))
            self.seen |= any(label != IGNORED for label in part[1:])
            if weight is not None:
                factors[number, places] = weight
                self.found = True
        return factors.to(batch["labels"].device)

    def after_stage(self, stage: Stage) -> None:
        self.weights = {}
        process = Process.this()
        if process.any_of(self.seen) and not process.any_of(self.found):
            raise MethodError(
                f"method {self.name!r}: no row of any batch was a row of the task as it was before the stage, so no "
                "weight was applied; does the data collator change rows at random?"
            )


def row_places(batch: Batch) -> list[tuple[int, list[int]]]:
    """The row of a batch and the places of the tokens of each of its rows, without padding.

    Rows that share a sequence begin where its positions begin again at 0.
    """
    positions, mask = batch.get("position_ids"), batch.get("attention_mask")
    found = []
    for number, row in enumerate(batch["labels"]):
        places = list(range(len(row)))
        if mask is not None and mask.dim() == 2:
            places = mask[number].nonzero().flatten().tolist()
        starts = [0]
        if positions is not None and mask is None:
            starts = (positions[number] == 0).nonzero().flatten().tolist()
        found += [(number, places[a:b]) for a, b in zip(starts, [*starts[1:], None], strict=True)]
    return found


def encoder_prompt(batch: Batch, number: int) -> list[int]:
    """What a sequence-to-sequence model's encoder reads of a row of a batch; empty for a causal model."""
    if "encoder_ids" not in batch:
        return []
    return batch["encoder_ids"][number][batch["encoder_mask"][number].bool()].tolist()


def row_key(ids: Sequence[int], labels: Sequence[int], prompt: Sequence[int] = ()) -> Key:
    """What identifies a row: its tokens, and which of them are supervised; the first is never.

    Args:
        prompt: what the encoder of a sequence-to-sequence model reads.
    """
    supervised = [label != IGNORED for label in labels[1:]]
    shown = (list(ids), supervised, list(prompt)) if prompt else (list(ids), supervised)
    return hashlib.blake2b(repr(shown).encode(), digest_size=16).digest()
