"""Negative log-likelihood of sequences under a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from holdfast.models.generation import by_batch, inference

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


def token_losses(
    model: PreTrainedModel | PeftModel,
    rows: Sequence[Mapping[str, Any]],
    *,
    batch_size: int,
    pad_token_id: int,
    on_batch: Callable[[int, int], None] | None = None,
    on_losses: Callable[[list[int], list[tuple[float, int]]], None] | None = None,
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Negative log-likelihood of the supervised tokens of each sequence, teacher-forced.

    Sequences that differ only in their last token, such as a question with one letter or another, are read once.

    Args:
        rows: sequences with ``input_ids`` and ``labels`` of equal length; a token with label -100 is not supervised,
            nor is the first token, which nothing predicts.
        batch_size: distinct sequences in one forward pass.
        pad_token_id: fills short sequences on the right; it is masked, so any id of the vocabulary will do.
        on_batch: called after every batch with (sequences done, all sequences); it may raise to stop.
        on_losses: called before it with the numbers of the batch's sequences, and nats and tokens of each.

    Returns:
        Sums in nats (log-probabilities in float32, summed in float64) and counts of tokens, both ``[rows]``.
    """
    losses, counts = np.zeros(len(rows)), np.zeros(len(rows), dtype=np.int64)
    alike: dict[tuple[int, ...], list[int]] = {}
    for i, row in enumerate(rows):
        alike.setdefault(tuple(row["input_ids"][:-1]), []).append(i)
    groups = sorted(alike.values(), key=lambda group: -len(rows[group[0]]["input_ids"]))
    with inference(model):

        def answers(batch: list[int]) -> list[list[tuple[float, int]]]:
            read = [list(rows[groups[number][0]]["input_ids"]) for number in batch]
            padding = [len(read[0]) - len(ids) for ids in read]
            ids, mask = (
                torch.tensor(values, device=model.device)
                for values in (
                    [ids + [pad_token_id] * p for ids, p in zip(read, padding, strict=True)],
                    [[1] * len(ids) + [0] * p for ids, p in zip(read, padding, strict=True)],
                )
            )
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits  # [batch, seq, vocab]
            return [[loss(i, logit) for i in groups[number]] for number, logit in zip(batch, logits, strict=True)]

        def loss(i: int, logit: torch.Tensor) -> tuple[float, int]:
            label = torch.tensor(rows[i]["labels"][1:], device=logit.device, dtype=torch.int64)
            supervised = label != -100
            nats = F.cross_entropy(logit[: len(label)][supervised].float(), label[supervised], reduction="none")
            return float(nats.cpu().double().sum()), len(nats)

        done = 0
        for batch, computed in by_batch(range(len(groups)), batch_size, answers):
            numbers = [i for number in batch for i in groups[number]]
            pairs = [pair for group in computed for pair in group]
            losses[numbers], counts[numbers] = zip(*pairs, strict=True)
            done += len(numbers)
            if on_losses is not None:
                on_losses(numbers, pairs)
            if on_batch is not None:
                on_batch(done, len(rows))
    return losses, counts
