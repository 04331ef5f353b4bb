"""A query for each prompt: one vector, whatever the length of the prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from holdfast.api.rows import IGNORED, Batch, TokenRow, prompt
from holdfast.tuners.prompt_keys import batch_queries


def prompt_queries(
    model: nn.Module, rows: Sequence[TokenRow], collate: Callable[[Sequence[TokenRow]], Batch], batch_size: int
) -> Tensor:
    """The mean of the model's last hidden states over a row's prompt, after the final norm, without dropout.

    Of a sequence-to-sequence model they are the encoder's. Equal prompts get equal vectors; up to float rounding these
    do not depend on ``batch_size`` or the other rows. A soft prompt before the input does not count.

    Args:
        rows: at least one; ``input_ids`` and perhaps ``labels``; in a row without a prompt (a text) all tokens count.
        collate: turns rows into a batch on the model's device, padded on the right.
        batch_size: rows in one forward pass.

    Returns:
        float32 [rows, hidden], on the CPU.
    """
    prompts = [tuple(prompt(row)) for row in rows]
    distinct = sorted(dict.fromkeys(prompts), key=len, reverse=True)
    vectors: dict[tuple[int, ...], Tensor] = {}
    for start in range(0, len(distinct), batch_size):
        part = distinct[start : start + batch_size]
        batch = collate([{"input_ids": list(ids), "labels": [IGNORED] * len(ids)} for ids in part])
        vectors |= zip(part, batch_queries(model, batch["input_ids"], batch["attention_mask"]).cpu(), strict=True)
    return torch.stack([vectors[ids] for ids in prompts])
