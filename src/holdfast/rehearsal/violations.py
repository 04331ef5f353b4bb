"""How many activations of an optimizer step's samples violate the margin loss, which no micro-batch alone can know."""

from __future__ import annotations

import math

import torch

from holdfast.api.stage import Extra, Rehearsed, Stage
from holdfast.engines.process import Process
from holdfast.models.generation import evaluating
from holdfast.models.head import hidden_only
from holdfast.rehearsal.teacher import StateTeacher


@torch.no_grad()
def violations(stage: Stage, extra: Extra, teacher: StateTeacher) -> int:
    """Count them under the current weights, without dropout or gradient, over all processes: one more forward pass.

    Every process measures its share of the samples. All make as many forward passes, since an engine may divide the
    model.

    Args:
        extra: the samples, the same in all processes, and the hidden states that the loss needs of them.
    """
    process, size, model = Process.this(), stage.micro_batch_size, stage.model
    assert extra.samples is not None and not extra.per_process
    share = slice(process.rank, None, process.world)
    rows, samples = extra.rows[share], extra.samples[share]
    found = torch.zeros((), dtype=torch.float64)
    with evaluating(model):
        for start in range(0, math.ceil(len(extra.rows) / process.world), size):
            here = slice(start, start + size)
            batch = stage.collate(rows[here] or extra.rows[:1])
            labels = batch.pop("labels")
            outputs = model(**batch, output_hidden_states=True, use_cache=False, **hidden_only(model))
            hidden = tuple(outputs.hidden_states[layer][:, : labels.shape[1]] for layer in extra.layers)
            if rows[here]:
                rehearsed = Rehearsed(list(samples[here]), labels, None, hidden, 1.0, batch=batch)
                found += float(teacher.sums(rehearsed, batch, model)[1])
    return int(process.all_reduce_sum(found))
