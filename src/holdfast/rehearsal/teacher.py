"""The teacher of a rehearsal loss, which is the model as it was, and the loss of the student against it.

For a fixed set of samples, the loss's view of the teacher is computed once and read from disk. For rows that hardly
come twice, such as the current task's, the teacher runs beside the student: only the trained weights are held twice,
and they are exchanged for one forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from holdfast.api.rows import Batch, TokenRow, model_inputs, token_mask
from holdfast.api.stage import Rehearsed, Stage
from holdfast.engines.pieces import full, is_divided, trainable
from holdfast.engines.process import Process
from holdfast.engines.vectors import weights
from holdfast.engines.whole import model_fingerprint
from holdfast.errors import DataError, RunDirectoryError
from holdfast.losses import chunked_kl, l1_loss, l2_loss, margin_sums
from holdfast.losses.chunked import Head
from holdfast.losses.next_token import predicting
from holdfast.models.generation import evaluating
from holdfast.models.head import head, hidden_only
from holdfast.models.pictures import HIGHEST_PLACE
from holdfast.models.pretrained import tokenizer_fingerprint
from holdfast.rehearsal.cache import BuildPlan, TeacherCache, state_cache
from holdfast.rehearsal.options import RehearsalOptions
from holdfast.rehearsal.samples import rows_fingerprint
from holdfast.rehearsal.states import unpack

States = Callable[[Rehearsed, Batch], tuple[Tensor, Tensor]]
"""(rehearsal rows, the task's batch) -> the teacher's hidden states [rows, seq, hidden] and their mask [rows, seq]."""


def padded(states: Sequence[Tensor], like: Tensor) -> tuple[Tensor, Tensor]:
    """Pad rows of [tokens, width] with zeros to the length of ``like``, [rows, seq, ...].

    Returns:
        [rows, seq, width], and the mask [rows, seq] of the tokens that are not padding, on the device of ``like``.
    """
    seq = like.shape[1]
    result = torch.stack([nn.functional.pad(s.to(like.device), (0, 0, 0, seq - len(s))) for s in states])
    lengths = torch.tensor([len(s) for s in states], device=like.device)
    return result, torch.arange(seq, device=like.device) < lengths[:, None]


def predicting_states(row: TokenRow, hidden: Tensor) -> Tensor:
    """The hidden states of a row, [tokens, hidden], that predict its supervised tokens: [supervised tokens, hidden]."""
    return hidden[predicting(torch.tensor([row["labels"]]))[0].to(hidden.device)]


class HiddenTeacher:
    """A teacher that gives hidden states: of the last layer, with the head, for KL; of any layer for L1 and L2.

    Args:
        states: gives the teacher's hidden states of the student's rows.
        teacher_head: the teacher's head; None where it is still the student's.
    """

    def __init__(self, options: RehearsalOptions, states: States, teacher_head: Head | None):
        self.options, self.states, self.teacher_head = options, states, teacher_head

    def sums(self, rehearsed: Rehearsed, batch: Batch, model: nn.Module) -> tuple[Tensor, Tensor]:
        """The loss's sum, with gradient, and the number of its entries: of KL the positions that predict a supervised
        token, of L1 and L2 all entries of the hidden states of all tokens that count."""
        student = rehearsed.hidden[0]
        target, mask = self.states(rehearsed, batch)
        target = target.to(student.dtype)
        if self.options.loss != "kl":
            mask = _compared(mask, self.options, rehearsed.batch or batch)
            loss = l1_loss if self.options.loss == "l1" else l2_loss
            entries = torch.count_nonzero(mask) * student.shape[-1]
            return loss(student, target, mask) * entries, entries
        student_head, places = head(model), predicting(rehearsed.labels)
        return chunked_kl(
            student[places],
            student_head,
            target[places],
            self.teacher_head or student_head,
            None,
            self.options.divergence,
            student_logits=rehearsed.computed_logits(),
        )


class StateTeacher:
    """GeRe's teacher: the thresholds, and the state of each activation in two bits."""

    def __init__(self, options: RehearsalOptions, cache: TeacherCache, low: Tensor, high: Tensor):
        self.options, self.cache, self.low, self.high = options, cache, low, high

    def sums(self, rehearsed: Rehearsed, batch: Batch, model: nn.Module) -> tuple[Tensor, Tensor]:
        """:func:`.margin_sums` over all tokens of the samples that count."""
        student = rehearsed.hidden[0]
        low, high = self.low.to(student.device), self.high.to(student.device)
        classes = [unpack(packed, len(low)) for packed in self.cache.read_many(rehearsed.samples)]
        target, mask = padded(classes, student)
        mask = _compared(mask, self.options, rehearsed.batch or batch)
        return margin_sums(student, target, low, high, mask, self.options.reduction)


def _compared(mask: Tensor, options: RehearsalOptions, batch: Batch) -> Tensor:
    """The tokens whose hidden states count, [rows, seq]: those of the mask, and of pictures if the options say so."""
    return mask if options.places else mask.bool() & (batch["input_ids"] > HIGHEST_PLACE).to(mask.device)


class LiveStates:
    """Hidden states of the model with the weights at the time of construction, without dropout or gradient."""

    def __init__(self, model: nn.Module, layer: int):
        self.model, self.layer = model, layer
        theta = weights(model)
        self.weights = theta.like({name: t.clone() for name, t in theta.tensors.items()})
        self._undivided = {name: p for name, p in trainable(model).items() if name not in theta.pieces}
        copies = {id(p): self.weights.tensors[name] for name, p in self._undivided.items()}
        now = head(model)

        def copied(t: Tensor) -> Tensor:
            """A trained tensor's copy, which ``weights`` may hold already; others need none."""
            if id(t) in copies:
                return copies[id(t)]
            return full(t).detach().clone() if t.requires_grad else full(t).detach()

        self._head = now._replace(weight=copied(now.weight), bias=None if now.bias is None else copied(now.bias))

    def __call__(self, rehearsed: Rehearsed, batch: Batch) -> tuple[Tensor, Tensor]:
        batch = rehearsed.batch or batch
        inputs = model_inputs(batch)
        with self.in_place(), evaluating(self.model), torch.no_grad():
            outputs = self.model(**inputs, output_hidden_states=True, use_cache=False, **hidden_only(self.model))
        hidden = outputs.hidden_states[self.layer]
        return hidden, token_mask(batch)

    def head(self) -> Head:
        """The head at that time, in one piece; tensors that are not trained are the model's own."""
        return self._head

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Give the model its weights of that time for as long as the context lasts."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def _exchange(self) -> None:
        """Swap whole tensors; of an engine's pieces, which must stay where they lie, swap the values."""
        copies = self.weights.tensors
        for name, p in self._undivided.items():
            p.data, copies[name] = copies[name], p.data
        if self.weights.pieces:
            weights(self.model).exchange_(self.weights, list(self.weights.pieces))


def cached_teacher(
    options: RehearsalOptions, stage: Stage, rows: Sequence[TokenRow], folder: Path, key: dict[str, Any]
) -> tuple[HiddenTeacher | StateTeacher, dict[str, Any]]:
    """The teacher of a fixed set of samples, from the cache on disk, which is built where there is none.

    Args:
        key: the key of an earlier cache that must be used (of the teacher ``start`` after the first stage); empty: the
            teacher is the model as it is now.

    Returns:
        the teacher, and the key of its cache.

    Raises:
        DataError: a file of the cache is damaged, or the earlier cache is of other samples or another tokenizer.
        RuntimeError: the earlier cache is gone and cannot be built again.
    """
    layer = options.compared_layer
    earlier = bool(key)
    asked = {
        "tokenizer": tokenizer_fingerprint(stage.tokenizer) if stage.tokenizer is not None else None,
        "samples": rows_fingerprint(rows),
        "layer": layer,
    }
    if changed := [name for name, value in asked.items() if earlier and key.get(name) != value]:
        raise DataError(
            f"{options.path or options.dataset or folder}: its {' and '.join(changed)} are not those that the teacher, "
            "the model before the first stage, was asked about when the run began, and that model cannot be asked "
            f"again ({folder} holds its answers); put the old file back, or start the run again in another output"
        )
    key = key or {"model": model_fingerprint(stage.model)} | asked

    def compute(batch: Sequence[TokenRow]) -> list[Tensor]:
        if earlier:
            raise RunDirectoryError(
                f"{folder}: the teacher's cache is gone, and the model is no longer the one that it was made from; "
                "start the run again in another output"
            )
        return stage.hidden_states(batch, layer)

    process = Process.this()
    plan = BuildPlan(
        batch_rows=stage.micro_batch_size,
        rank=process.rank,
        world=process.world,
        barrier=process.wait,
        together=is_divided(stage.model),
        show=stage.show,
    )
    if options.loss == "margin":
        cache, low, high = state_cache(
            folder, key, rows, compute, multiple=options.multiple, places=options.places, plan=plan
        )
        return StateTeacher(options, cache, low, high), key
    now, extras = head(stage.model), dict[str, Tensor]()
    if options.loss == "kl" and now.weight.requires_grad:
        extras = {"head": full(now.weight.detach()).cpu()}
        if now.bias is not None:
            extras["bias"] = full(now.bias.detach()).cpu()
    cache = TeacherCache.open_or_build(folder, key | {"kind": "hidden"}, rows, compute, extras=extras, plan=plan)
    teacher_head = None
    if extras:
        device = now.weight.device
        bias = cache.extra("bias").to(device) if "bias" in extras else None
        teacher_head = now._replace(weight=cache.extra("head").to(device), bias=bias)

    def states(rehearsed: Rehearsed, batch: Batch) -> tuple[Tensor, Tensor]:
        return padded(cache.read_many(rehearsed.samples), rehearsed.hidden[0])

    return HiddenTeacher(options, states, teacher_head), key


def live_teacher(options: RehearsalOptions, stage: Stage) -> HiddenTeacher:
    """The model as it is now, which then runs beside the student."""
    states = LiveStates(stage.model, options.compared_layer)
    return HiddenTeacher(options, states, states.head())
