"""The rows that methods add to a stage: into the batches of each step, through the model, and back to the methods."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, MutableMapping, Sequence
from copy import copy
from itertools import islice, zip_longest
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from holdfast.api.method import Method
from holdfast.api.rows import Batch, TokenRow, bare, count_supervised, model_inputs, text_mask, token_mask
from holdfast.api.stage import Extra, Rehearsed, Step
from holdfast.data.collate import Collator, concat
from holdfast.engines.pieces import is_divided
from holdfast.engines.process import Process
from holdfast.errors import ConfigError
from holdfast.losses.next_token import predicting, supervised_tokens
from holdfast.models.head import hidden_only
from holdfast.models.pictures import HIGHEST_PLACE
from holdfast.models.supervised import OneRow, head_on
from holdfast.training.batches import is_packed, is_token_batch, media, tokens_alone

Counted = tuple[int, int, int]
"""Numbers of tokens: supervised ones, those of text, all."""
ROW_KEYS = {"input_ids", "attention_mask", "labels"}
ENCODER_KEYS = {"encoder_ids", "encoder_mask"}
"""What batches of a sequence-to-sequence model have beside them."""
OWN = ("task", "instead")
"""The ways in which the rows of the task's own forward pass come back to a method."""

KEY = "rehearsal"
"""Where a batch that is a mapping holds the extra rows beside it: by method name, their batch."""


def collate_tokens(pad: Collator, rows: Sequence[TokenRow]) -> Batch:
    """Make a batch of tokens and labels alone, whatever else the rows hold."""
    return pad([bare(row) for row in rows])


class Passed(NamedTuple):
    """What a forward pass made of some rows.

    Attributes:
        gathered: whether its logits are those of supervised tokens alone, [1, at least so many tokens, vocab].
        row: the first of the rows in the pass.
        token: the first of their supervised tokens in the pass.
    """

    outputs: Any
    gathered: bool = False
    row: int = 0
    token: int = 0


class ExtraRows:
    """The extra rows of one stage.

    :meth:`put_into` is called once in every optimizer step; :meth:`take_from`, :meth:`joint`, :meth:`joined` and
    :meth:`rehearsed`, in this order, for every micro-batch.
    """

    def __init__(self, model: nn.Module, pad: Collator, process: Process, joint_tokens: int):
        """
        Args:
            model: the trainer's, not wrapped by an engine.
            pad: makes a batch of rows.
            process: this one.
            joint_tokens: most tokens, padding included, of task rows and extra rows that share a forward pass.
        """
        self.model, self.pad, self.process = model, pad, process
        self.in_step = is_divided(model)  # whether all processes must make the same forward passes
        self.joint_tokens = 0 if self.in_step else joint_tokens
        self.by_method: dict[str, Extra] = {}  # of the current step
        self.apart: deque[dict[str, Batch]] = deque()  # of its micro-batches that are no mappings, in order
        self.samples: deque[Tensor] = deque()  # of its micro-batches whose task rows were all replaced, in order

    @property
    def instead(self) -> bool:
        """Whether rows of a method stand in the places of all task rows of the step."""
        return any(extra.way == "instead" for extra in self.by_method.values())

    def put_into(self, batches: list[Any], sizes: Sequence[int], step: Step, methods: Sequence[Method]) -> list[Any]:
        """Ask the methods for the rows of a step, and put these into its batches, or beside them.

        Args:
            batches: the micro-batches of this process; those that get rows beside them are changed in place.
            sizes: task rows in each that count.

        Returns:
            the batches of the step; the same list where no row was replaced.

        Raises:
            ConfigError: a method's rows cannot go with batches of this kind.
        """
        answers = {method.name: method.extra_rows(step) for method in methods}
        self.by_method = {name: extra for name, extra in answers.items() if extra is not None}
        for method in methods:
            if method.needs_rows or method.needs_token_batches:
                check_whole(batches, method.name)
        for name, extra in self.by_method.items():
            if extra.way != "beside":
                for batch in batches:
                    check_tokens(batch, name)
                    _check_replaced(batch, extra)
        _check_places(self.by_method)
        for name, extra in self.by_method.items():
            if extra.way == "replace":
                batches = self._replace(batches, sizes, extra, step.random(f"{name}/places"))
            elif extra.way == "instead":
                batches = self._put_instead(batches, extra)
        beside: list[dict[str, Batch]] = [{} for _ in batches]
        for name, extra in self.by_method.items():
            if extra.way in OWN:
                step.rehearsal_tokens[name] = self._sum([_tokens(batch) for batch in batches])
            elif extra.way == "beside":
                step.rehearsal_tokens[name] = self._put_beside(beside, extra, name)
        self.apart.clear()
        for batch, rows in zip(batches, beside, strict=True):
            if not isinstance(batch, MutableMapping):
                self.apart.append(rows)
            elif rows:
                batch[KEY] = rows
        return batches

    def _sum(self, counts: list[Counted]) -> Counted:
        """Sum over batches and processes."""
        summed = self.process.all_reduce_sum(torch.tensor([*counts, (0, 0, 0)], dtype=torch.float64).sum(0))
        supervised, text, tokens = summed.long().tolist()
        return supervised, text, tokens

    def _put_beside(self, beside: list[dict[str, Batch]], extra: Extra, name: str) -> Counted:
        """Divide the rows among all micro-batches; return what :func:`_tokens` counts of them in all processes."""
        samples = list(extra.samples) if extra.samples is not None else list(range(len(extra.rows)))
        rank, world = (0, 1) if extra.per_process else (self.process.rank, self.process.world)
        # Where all processes have the same rows, each counts them all by itself, without waiting for the others.
        counts = [] if extra.per_process else [_tokens_of_row(row) for row in extra.rows]
        for number, of_batch in enumerate(beside):
            part = slice(number * world + rank, None, len(beside) * world)
            rows = extra.rows[part]
            if rows or self.in_step:
                collated = collate_tokens(self.pad, rows or extra.rows[:1])
                counts += [_tokens(collated)] if extra.per_process and rows else []
                collated["sample"] = torch.tensor(samples[part] if rows else samples[:1])
                collated["counts"] = bool(rows)  # False: the row only keeps the number of forward passes equal
                of_batch[name] = collated
        if extra.per_process:
            return self._sum(counts)
        supervised, text, tokens = map(sum, zip((0, 0, 0), *counts, strict=True))
        return supervised, text, tokens

    def _replace(self, batches: list[Any], sizes: Sequence[int], extra: Extra, chance: random.Random) -> list[Any]:
        """Put the rows in random places of the step, instead of the task rows that stood there."""
        process, rows = self.process, extra.rows
        if extra.per_process:
            rows = [row for part in zip_longest(*process.gather(list(rows))) for row in part if row is not None]
        counts = process.gather(list(sizes))
        places = [(b, w, r) for b in range(len(batches)) for w in range(process.world) for r in range(counts[w][b])]
        taken = sorted(chance.sample(range(len(places)), min(len(rows), len(places))))
        chosen = {places[place]: row for place, row in zip(taken, rows, strict=False)}
        result = []
        for b, batch in enumerate(batches):
            size = len(batch["input_ids"])
            stay = [r for r in range(size) if (b, process.rank, r) not in chosen]
            new = [chosen[b, process.rank, r] for r in range(size) if (b, process.rank, r) in chosen]
            parts = [{key: value[stay] for key, value in batch.items()}] if stay else []
            if new:
                device = batch["input_ids"].device
                parts.append({key: value.to(device) for key, value in collate_tokens(self.pad, new).items()})
            result.append(concat(parts[0], parts[1], self.pad.pad_token_id) if len(parts) == 2 else parts[0])
        return result

    def _put_instead(self, batches: list[Any], extra: Extra) -> list[Any]:
        """Put a row in the place of each task row of this process; what else a batch says of its rows is left out but
        for their numbers."""
        rows, samples = iter(extra.rows), iter(extra.samples or range(len(extra.rows)))
        self.samples.clear()
        result = []
        for batch in batches:
            size, device = len(batch["input_ids"]), batch["input_ids"].device
            new = collate_tokens(self.pad, list(islice(rows, size)))
            numbers = {"row": batch["row"]} if "row" in batch else {}
            result.append({key: value.to(device) for key, value in new.items()} | numbers)
            self.samples.append(torch.tensor(list(islice(samples, size))))
        return result

    def take_from(self, inputs: Any, to_device: Callable[[Any], Any]) -> dict[str, Batch]:
        """Remove the extra rows from a micro-batch and return them, by method name.

        Args:
            inputs: the micro-batch as the trainer has prepared it; the trainer may have made another one of it.
            to_device: moves those to the model's device that did not go with the micro-batch.
        """
        if self.apart:
            return to_device(self.apart.popleft())
        return inputs.pop(KEY, {}) if self.by_method and isinstance(inputs, MutableMapping) else {}

    def joint(self, inputs: Any, extra: dict[str, Batch]) -> dict[str, Batch]:
        """The extra rows that share the task's forward pass: all of a micro-batch, or none."""
        return extra if self.fits_one_pass(inputs, extra) else {}

    def fits_one_pass(self, inputs: Any, extra: dict[str, Batch]) -> bool:
        """Whether task rows and extra rows may share a forward pass, and one pass is cheaper than two."""
        if not extra or set(inputs) - ENCODER_KEYS != ROW_KEYS or inputs["attention_mask"].dim() > 2:
            return False
        sizes = [batch["input_ids"].shape for batch in (inputs, *extra.values())]
        tokens = sum(rows for rows, _ in sizes) * max(seq for _, seq in sizes)
        return tokens <= self.joint_tokens

    def joined(self, inputs: Any, joint: dict[str, Batch]) -> Any:
        """A new batch for the task's forward pass: the task's rows, and the extra rows that share it."""
        batch = copy(inputs)
        for extra in joint.values():
            batch = concat(batch, model_inputs(extra) | {"labels": extra["labels"]}, 0)
        if any(request.layers for request in self._sharing(joint)):
            batch["output_hidden_states"] = True
        return batch

    def _sharing(self, joint: dict[str, Batch]) -> list[Extra]:
        """The requests whose rows go through the task's forward pass."""
        return [extra for name, extra in self.by_method.items() if name in joint or extra.way in OWN]

    def needs_all_logits(self, joint: dict[str, Batch]) -> bool:
        """Whether a method needs logits of every position in the task's forward pass."""
        return any(request.logits is True for request in self._sharing(joint))

    def rehearsed(
        self, model: Any, inputs: Any, task: Passed, extra: dict[str, Batch], joint: dict[str, Batch], step: Step
    ) -> dict[str, Rehearsed]:
        """What the model made of the extra rows, by method: in the task's forward pass, or in one of their own.

        Args:
            model: as the engine wraps it.
            inputs: the task's rows.
            task: the task's forward pass. Extra rows are cut off its outputs, whose logits are then [rows, seq, vocab]
                or, where they were gathered, [supervised tokens, vocab].
            extra: the extra rows beside this micro-batch.
            joint: those that shared the pass.
        """
        outputs = task.outputs
        if joint and not _has_gradient(outputs.get("logits")):
            # This trainer's loss makes no logits, or logits without gradient (TRL's fused head). From now on extra rows
            # have a forward pass of their own.
            self.joint_tokens, joint = 0, {}
        rehearsed = {}
        first, token = (len(inputs["input_ids"]), int(supervised_tokens(inputs["labels"]))) if joint else (0, 0)
        place = first
        for name, request in self.by_method.items():
            own = request.way in OWN
            batch = inputs if own else extra.get(name)
            if batch is None:
                continue
            if request.way == "instead":
                batch = {**inputs, "sample": self.samples.popleft()}
            if name in joint:
                rehearsed[name] = self._of_method(name, batch, Passed(outputs, task.gathered, place, token), step)
                place, token = place + len(batch["input_ids"]), token + int(supervised_tokens(batch["labels"]))
            else:
                shared = own and _has_all(outputs, request)
                passed = task if shared else self._forward(model, batch, request)
                rehearsed[name] = self._of_method(name, batch, passed, step)
        if joint:
            outputs["hidden_states"] = None
        if joint and not task.gathered:
            outputs["logits"] = outputs.logits[:first]
        if task.gathered and outputs is not None:
            outputs["logits"] = _predictions(task, inputs["labels"])
        return rehearsed

    def task_pass(self, model: Any, batch: Batch) -> Any:
        """The outputs of a forward pass of the task's rows that gives logits of every token, with gradient."""
        return self._forward(model, batch, Extra((), "task")).outputs

    def _forward(self, model: Any, batch: Batch, request: Extra) -> Passed:
        """A forward pass of extra rows by themselves.

        It bypasses DDP: in DDP's forward pass processes wait for each other, and not every process has such rows. DDP
        gets the gradients all the same, through :func:`.reach_all`.
        """
        model = self.model if isinstance(model, DistributedDataParallel) else model
        options = {"output_hidden_states": True} if request.layers else {}
        options |= {} if request.logits else hidden_only(self.model)
        inputs = model_inputs(batch)
        if request.logits != "supervised":
            return Passed(model(**inputs, use_cache=False, **options))
        with head_on(self.model, OneRow.of(batch["labels"])) as gathered:
            outputs = model(**inputs, use_cache=False, **options)
        return Passed(outputs, gathered.done)

    def _of_method(self, name: str, batch: Batch, passed: Passed, step: Step) -> Rehearsed:
        request, labels, counts = self.by_method[name], batch["labels"], batch.get("counts", True)
        outputs, (rows, seq) = passed.outputs, labels.shape
        part = slice(passed.row, passed.row + rows)
        has_task_logits = request.way in OWN and (passed.gathered or _has_all_logits(outputs, labels))
        share, token_share, whole_share = (
            counts * step.micro_batches * here / max(in_step, 1)
            for here, in_step in zip(_tokens(batch), step.rehearsal_tokens[name], strict=True)
        )
        return Rehearsed(
            samples=batch["sample"].tolist() if "sample" in batch else [],
            labels=labels,
            logits=_logits(passed, labels, request) if request.logits else None,
            hidden=tuple(outputs.hidden_states[layer][part, :seq] for layer in request.layers),
            share=share,
            counts=counts,
            task_logits=_predictions(passed, labels) if has_task_logits else None,
            batch=batch,
            token_share=token_share,
            whole_share=whole_share,
        )


def check_tokens(batch: Any, name: str) -> None:
    """ConfigError if a method works on the task's rows in the batches, and these are no rows of the next-token loss."""
    if not is_token_batch(batch):
        raise ConfigError(
            f"method {name}: works on the task's rows in each batch, and the batches of this trainer do not have "
            "input_ids and a label for each; a trainer of the next-token loss, such as Trainer or TRL's SFTTrainer, "
            "would do, or a method whose rows go beside the task's (way beside)"
        )


def check_whole(batches: Sequence[Any], name: str) -> None:
    """ConfigError if a method reads the task's rows as tokens, and these say not all of a row."""
    if column := next(filter(None, map(media, batches)), None):
        raise ConfigError(f"method {name}: train_dataset: {tokens_alone(column)}")


def _check_places(extras: dict[str, Extra]) -> None:
    """ConfigError if rows of several methods would take the same places."""
    ways = {name: extra.way for name, extra in extras.items() if extra.way in ("replace", "instead")}
    if len(ways) > 1 and "instead" in ways.values():
        first = next(name for name, way in ways.items() if way == "instead")
        others = ", ".join(name for name in ways if name != first)
        raise ConfigError(
            f"method {first}: its rows take the places of all task rows, so that none is left for those of {others} "
            "(way replace); way beside would do"
        )


def _check_replaced(batch: Any, extra: Extra) -> None:
    if extra.way in ("replace", "instead") and is_packed(batch):
        raise ConfigError(
            f"way {extra.way}: rows that share a sequence cannot be replaced one by one; use way beside, or turn "
            "packing off"
        )


def _tokens(batch: Batch) -> Counted:
    """How many tokens of a batch are supervised, how many are text, and how many there are."""
    text, tokens = (int(torch.count_nonzero(mask)) for mask in (text_mask(batch), token_mask(batch)))
    return int(supervised_tokens(batch["labels"])), text, tokens


def _tokens_of_row(row: TokenRow) -> Counted:
    ids = row["input_ids"]
    return count_supervised(row), sum(token > HIGHEST_PLACE for token in ids), len(ids)


def _logits(passed: Passed, labels: Tensor, request: Extra) -> Tensor:
    """The logits of some rows, with labels [rows, seq], as a method asked for them."""
    if request.logits == "supervised":
        return _predictions(passed, labels)
    rows, seq = labels.shape
    return passed.outputs.logits[passed.row : passed.row + rows, :seq]


def _predictions(passed: Passed, labels: Tensor) -> Tensor:
    """The logits that predict the supervised tokens of some rows."""
    rows, seq = labels.shape
    logits = passed.outputs.logits
    if passed.gathered:
        return logits[0, passed.token : passed.token + int(supervised_tokens(labels))]
    return logits[passed.row : passed.row + rows, :seq][predicting(labels)]


def _has_all(outputs: Any, request: Extra) -> bool:
    """Whether a forward pass gave what a method needs."""
    states = outputs.get("hidden_states") or (None,)
    logits_are_there = not request.logits or _has_gradient(outputs.get("logits"))
    return logits_are_there and (not request.layers or _has_gradient(states[-1]))


def _has_all_logits(outputs: Any, labels: Tensor) -> bool:
    """Whether a forward pass gave logits of every position, with gradient."""
    logits = outputs.get("logits")
    return _has_gradient(logits) and logits.shape[:2] == labels.shape


def _has_gradient(tensor: Any) -> bool:
    return isinstance(tensor, Tensor) and tensor.requires_grad
