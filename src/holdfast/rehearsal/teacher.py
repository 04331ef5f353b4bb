"""The teacher of a rehearsal loss: the model as it was, and the loss of the student beside it.

For a fixed set of samples, what the loss needs is computed once and read from disk. For rows that are hardly seen
twice, as the current task's, the teacher runs beside the student: only the trained weights are kept twice, and they are
exchanged for one forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from holdfast.api.rows import Batch, TokenRow
from holdfast.api.stage import Rehearsed, Stage
from holdfast.engines.pieces import full, is_divided, trainable
from holdfast.engines.process import Process
from holdfast.engines.vectors import weights
from holdfast.engines.whole import model_fingerprint
from holdfast.losses import chunked_kl, l1_loss, l2_loss, margin_loss
from holdfast.losses.chunked import Head
from holdfast.models.generation import evaluating
from holdfast.models.head import head, hidden_only
from holdfast.models.pretrained import tokenizer_fingerprint
from holdfast.rehearsal.cache import TeacherCache, state_cache
from holdfast.rehearsal.samples import rows_fingerprint
from holdfast.rehearsal.states import unpack

States = Callable[[Rehearsed, Batch], tuple[Tensor, Tensor]]
"""(student's rows, the task's batch) -> the teacher's hidden states [rows, seq, hidden], and mask [rows, seq]."""


def padded(states: Sequence[Tensor], like: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of [tokens, width] as [rows, seq, width], zero where padded, and the mask [rows, seq] of real tokens."""
    seq = like.shape[1]
    result = torch.stack([nn.functional.pad(s.to(like.device), (0, 0, 0, seq - len(s))) for s in states])
    lengths = torch.tensor([len(s) for s in states], device=like.device)
    return result, torch.arange(seq, device=like.device) < lengths[:, None]


def predicting(labels: Tensor) -> Tensor:
    """The positions [rows, seq] that predict a supervised token: the one after them has a label."""
    return nn.functional.pad(labels[:, 1:] != -100, (0, 1))


class HiddenTeacher:
    """A teacher of which the loss needs hidden states: the last ones and the head for KL, any layer's for L1 and L2.

    Args:
        states: gives the teacher's hidden states of the student's rows.
        teacher_head: what made logits of them; None where the student's own head is still the teacher's.
    """

    def __init__(self, options: Any, states: States, teacher_head: Head | None):
        self.options, self.states, self.teacher_head = options, states, teacher_head

    def term(self, rehearsed: Rehearsed, batch: Batch, model: nn.Module) -> Tensor:
        """The loss, a mean over positions; KL over those that predict a supervised token, L1 and L2 over all."""
        student = rehearsed.hidden[0]
        target, mask = self.states(rehearsed, batch)
        target = target.to(student.dtype)
        if self.options.loss != "kl":
            return (l1_loss if self.options.loss == "l1" else l2_loss)(student, target, mask)
        own = head(model)
        old = self.teacher_head or own
        total, count = chunked_kl(
            student,
            own.weight,
            target,
            old.weight,
            predicting(rehearsed.labels),
            temperature=self.options.temperature,
            direction=self.options.direction,
            scale=self.options.temperature_squared,
            student_bias=own.bias,
            teacher_bias=old.bias,
            softcap=own.softcap,
            logit_scale=own.logit_scale,
            student_logits=rehearsed.made,
        )
        return total / count.clamp(min=1)  # no position, where a process goes along without rows of its own


class StateTeacher:
    """GeRe's teacher: two bits an activation, and the thresholds."""

    def __init__(self, options: Any, cache: TeacherCache, low: Tensor, high: Tensor):
        self.options, self.cache, self.low, self.high = options, cache, low, high

    def term(self, rehearsed: Rehearsed, batch: Batch, model: nn.Module) -> Tensor:
        """The margin loss over all tokens of the samples."""
        student = rehearsed.hidden[0]
        low, high = self.low.to(student.device), self.high.to(student.device)
        classes = [unpack(packed, len(low)) for packed in self.cache.read_many(rehearsed.samples)]
        target, mask = padded(classes, student)
        return margin_loss(student, target, low, high, mask, self.options.reduction)


class LiveStates:
    """Hidden states of the model with the weights that it had when this was made, without dropout or gradient."""

    def __init__(self, model: nn.Module, layer: int):
        self.model, self.layer = model, layer
        theta = weights(model)
        self.weights = theta.like({name: t.clone() for name, t in theta.tensors.items()})
        self._undivided = {name: p for name, p in trainable(model).items() if name not in theta.pieces}
        kept = {id(p): self.weights.tensors[name] for name, p in self._undivided.items()}
        now = head(model)

        def as_it_is(t: Tensor) -> Tensor:
            return kept[id(t)] if id(t) in kept else full(t).detach().clone() if t.requires_grad else full(t).detach()

        bias = None if now.bias is None else as_it_is(now.bias)
        self._head = now._replace(weight=as_it_is(now.weight), bias=bias)

    def __call__(self, rehearsed: Rehearsed, batch: Batch) -> tuple[Tensor, Tensor]:
        batch = rehearsed.batch or batch
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "position_ids") if key in batch}
        with self.in_place(), evaluating(self.model), torch.no_grad():
            outputs = self.model(**inputs, output_hidden_states=True, use_cache=False, **hidden_only(self.model))
        hidden = outputs.hidden_states[self.layer]
        return hidden, batch.get("attention_mask", torch.ones_like(batch["input_ids"]))

    def head(self) -> Head:
        """The head as it was, in one piece; weights that are not trained are those of the model."""
        return self._head

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the model has the weights that it had then."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def _exchange(self) -> None:
        """Whole tensors change places; the engine's pieces are where it knows them, so their values do."""
        kept = self.weights.tensors
        for name, p in self._undivided.items():
            p.data, kept[name] = kept[name], p.data
        if self.weights.pieces:
            weights(self.model).exchange_(self.weights, list(self.weights.pieces))


def cached_teacher(
    options: Any, stage: Stage, rows: Sequence[TokenRow], folder: Path, key: dict[str, Any]
) -> tuple[HiddenTeacher | StateTeacher, dict[str, Any]]:
    """The teacher of a fixed set of samples, from disk; the model as it is now is asked where there is no cache.

    Args:
        key: what the cache was made for, if it must be an earlier one (the teacher ``start`` after the first stage);
            empty: the model as it is now.

    Returns:
        the teacher, and what its cache was made for.

    Raises:
        DataError: a file of the cache is damaged.
        RuntimeError: an earlier teacher's cache is gone, so that it cannot be made again.
    """
    layer = -1 if options.loss == "kl" else options.layer
    earlier = bool(key)
    key = key or {
        "model": model_fingerprint(stage.model),
        "tokenizer": tokenizer_fingerprint(stage.tokenizer) if stage.tokenizer is not None else None,
        "samples": rows_fingerprint(rows),
        "layer": layer,
    }

    def compute(batch: Sequence[TokenRow]) -> list[Tensor]:
        if earlier:
            raise RuntimeError(
                f"{folder}: the teacher's cache is gone, and the model is no longer the one that it was made from; "
                "start the run again in another output"
            )
        return stage.hidden_states(batch, layer)

    process = Process.this()
    settings: dict[str, Any] = {"rank": process.rank, "world": process.world, "barrier": process.wait}
    settings |= {"batch_rows": stage.micro_batch_size, "together": is_divided(stage.model)}
    if options.loss == "margin":
        cache, low, high = state_cache(folder, key, rows, compute, multiple=options.multiple, **settings)
        return StateTeacher(options, cache, low, high), key
    extras, trained = {}, head(stage.model)
    if options.loss == "kl" and trained.weight.requires_grad:
        extras = {"head": full(trained.weight.detach()).cpu()}
        if trained.bias is not None:
            extras["bias"] = full(trained.bias.detach()).cpu()
    cache = TeacherCache.open_or_build(folder, key | {"kind": "hidden"}, rows, compute, extras=extras, **settings)
    old = None
    if extras:
        device = trained.weight.device
        bias = cache.extra("bias").to(device) if "bias" in extras else None
        old = trained._replace(weight=cache.extra("head").to(device), bias=bias)

    def states(rehearsed: Rehearsed, batch: Batch) -> tuple[Tensor, Tensor]:
        return padded(cache.read_many(rehearsed.samples), rehearsed.hidden[0])

    return HiddenTeacher(options, states, old), key


def live_teacher(options: Any, stage: Stage) -> HiddenTeacher:
    """The model as it is now, run beside the student."""
    states = live_states(options, stage)
    return HiddenTeacher(options, states, states.head())


def live_states(options: Any, stage: Stage) -> LiveStates:
    """The hidden states that the loss needs, of the model as it is now."""
    return LiveStates(stage.model, -1 if options.loss == "kl" else options.layer)
