"""continual(TrainerClass): a method's hooks on any transformers Trainer, without a copied loop."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint, has_length

from holdfast.api.method import Method
from holdfast.api.rows import Batch, TokenRow
from holdfast.api.stage import Extra, Rehearsed, Stage, Step
from holdfast.data.collate import Collator, concat
from holdfast.engines.pieces import is_divided, trainable
from holdfast.engines.process import Process
from holdfast.engines.vectors import average_replicated, gradients, weights
from holdfast.errors import ConfigError, NonFiniteLossError
from holdfast.losses.next_token import supervised_tokens
from holdfast.methods import build
from holdfast.models.head import hidden_only
from holdfast.models.likelihood import token_losses
from holdfast.system.files import read_json
from holdfast.training.batches import count_rows, count_tokens, is_packed, list_row_numbers
from holdfast.training.checkpoint import COMPLETE
from holdfast.training.collated_rows import CollatedRows
from holdfast.training.cost import Cost
from holdfast.training.engine_mixin import EngineMixin, no_optimizer_saved
from holdfast.training.method_state import load_states
from holdfast.training.terms import Terms

Choice = str | Mapping[str, Any] | Method

ROW_KEYS = {"input_ids", "attention_mask", "labels"}
ONE_PASS_TOKENS = 4096
"""On an accelerator, task and rehearsal rows of up to so many tokens share a forward pass, since launching its kernels
costs more than their arithmetic. On a CPU two passes were always cheaper (benchmarks/RESULTS.md)."""


def continual(trainer_class: type) -> type:
    """Return a subclass of ``trainer_class`` that applies methods against forgetting.

    It takes two more arguments. ``method``: a name, a mapping ``{"name": ..., option: value}``, a :class:`Method`, or
    a list of these. ``task``: what the stage is called. Each call of ``train()`` is one stage: the methods build what
    they need before it and update their memory after it; set ``train_dataset`` and call it again for the next task.
    Everything that the class does otherwise stays as it is.
    """

    class Continual(EngineMixin, trainer_class):
        optimizer: Any

        def __init__(
            self,
            *args: Any,
            method: Choice | Sequence[Choice] = "sequential",
            task: str = "",
            rows: Sequence[TokenRow] | None = None,
            describe_rows: Callable[[list[int]], str] | None = None,
            stage_index: int = 1,
            states: Path | None = None,
            folder: Path | None = None,
            tokenizer: Any = None,
            **kwargs: Any,
        ) -> None:
            sharded = getattr(kwargs.get("model", args[0] if args else None), "_is_fsdp_managed_module", False)
            given = kwargs.get("args", args[1] if len(args) > 1 else None)
            if given is not None and given.ddp_find_unused_parameters is None:
                given.ddp_find_unused_parameters = False  # none is unused: see _Reach
            with no_optimizer_saved(given if sharded else None):
                super().__init__(*args, **kwargs)
            self.methods = [_built(m) for m in ([method] if isinstance(method, str | Mapping | Method) else method)]
            self.task = task
            self.stage_index = stage_index
            self.interrupted = False
            self.cost = Cost()
            self._rows = rows
            self._states = states
            self._folder = folder
            self._tokenizer = tokenizer
            self._describe_rows = describe_rows or list_row_numbers
            self._stage: Stage | None = None
            self._step: Step | None = None
            self._terms = Terms()
            self._extras: dict[str, Extra] = {}
            self._step_rows: list[int] = []  # of all micro-batches of the step, where they are known
            self._general_before: float | None = None
            self._pad = Collator(_pad_token_id(self.processing_class, self.data_collator))
            self._one_pass = True
            self._engine = None
            self._norm: float | None = None  # of the step's gradient, where an engine trains
            self._process = Process.this()
            self._together = False  # whether all processes must go through the model at the same time
            self._micro_batches = 1  # of the step in this process
            self._sizes: list[int] = []  # task rows of each
            self._optimizer_is_given = self.optimizer is not None
            self.add_callback(_AfterStep(self))

        def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
            if resume_from_checkpoint is True:
                resume_from_checkpoint = get_last_checkpoint(self.args.output_dir)
            self.cost = Cost()
            self.cost.start()
            stage = self._stage = Stage(
                index=self.stage_index,
                task=self.task or f"stage {self.stage_index}",
                model=self.model,
                rows=self._rows if self._rows is not None else self._dataset_rows(),
                collate=self._collate_rows,
                seed=self.args.seed,
                micro_batch_size=self.args.per_device_train_batch_size,
                folder=self._folder or Path(self.args.output_dir, "rehearsal"),
                tokenizer=self._tokenizer or self.processing_class,
                rows_a_step=self.args.train_batch_size * self.args.gradient_accumulation_steps * self._process.world,
            )
            self._engine = None
            self._make_engine()
            if self._engine is not None and self._states is not None:
                load_states(self.methods, self._states, self.model)  # again, divided as the weights are now
            self._together = is_divided(self.model)
            self._one_pass = not self._together
            for method in self.methods:
                method.before_stage(stage)
                self._make_engine()
            self._follow_parameters()
            if self._general_before is None:
                self._general_before = self._general_loss()
            self._terms = Terms(name for method in self.methods for name in method.declares(stage))
            if resume_from_checkpoint:
                load_states(self.methods, Path(str(resume_from_checkpoint), "method"), self.model)
                if self._process.main:
                    self.cost.load(read_json(Path(str(resume_from_checkpoint), COMPLETE))["cost"])
            for p in trainable(self.model).values():  # at rest, as the optimizer must find them
                setattr(p, "_replicated_grad_hook_registered", True)  # noqa: B010 - Trainer's; see average_replicated
            result = super().train(resume_from_checkpoint or None, *args, **kwargs)
            if not self.interrupted:
                self._terms.check(stage, self._process)
                for method in self.methods:
                    method.final_weights(stage)
                for method in self.methods:
                    method.after_stage(stage)
                self.stage_index += 1
            self.cost.stop()
            self._stage = self._step = None
            return result

        def forgetting_report(self) -> dict[str, Any]:
            """What training did to general ability: the loss on general text that was held out from rehearsal.

            Returns:
                ``before`` the first stage and ``after`` (now), mean nats per token; ``change`` (positive is worse);
                ``texts``, how many there are.

            Raises:
                ConfigError: no method of this trainer rehearses general or self-generated samples.
            """
            after = self._general_loss()
            if after is None or self._general_before is None:
                raise ConfigError(
                    "forgetting_report: needs a method that rehearses general or self-generated samples, such as "
                    '{"name": "gere", "path": ...}, and a call of train()'
                )
            before = self._general_before
            return {"before": before, "after": after, "change": after - before, "texts": len(self._general_rows())}

        def _general_rows(self) -> list[TokenRow]:
            return [row for method in self.methods for row in getattr(method, "held_out", [])]

        def _general_loss(self) -> float | None:
            rows = self._general_rows()
            if not rows:
                return None
            nats, tokens = token_losses(
                self.model, rows, batch_size=self.args.per_device_eval_batch_size, pad_token_id=self._pad.pad_token_id
            )
            return float(nats.sum() / tokens.sum())

        def _dataset_rows(self) -> Sequence[TokenRow]:
            dataset = self.train_dataset
            if hasattr(dataset, "column_names"):
                return CollatedRows(self._remove_unused_columns(dataset), self.data_collator)
            return CollatedRows(dataset, self._get_collator_with_removed_columns(self.data_collator))

        def get_batch_samples(self, epoch_iterator: Any, num_batches: int, *args: Any) -> tuple[list[Any], Any]:
            batches, items = super().get_batch_samples(epoch_iterator, num_batches, *args)
            if self._stage is None or not batches:
                return batches, items
            at, process = self.state.global_step, self._process
            if sizes := self._drop_repeated(batches):
                items = self._get_num_items_in_batch(batches, *args)
            self._sizes = sizes or [count_rows(batch) for batch in batches]
            own = torch.tensor([sum(self._sizes), len(batches)], dtype=torch.float64)
            rows, micro_batches = process.all_reduce_sum(own).long().tolist()
            self._micro_batches = len(batches)
            step = self._step = Step(
                stage=self._stage,
                index=at,
                rows=rows,
                micro_batches=micro_batches,
                logged=(at + 1) % self.state.logging_steps == 0 or at + 1 == self.state.max_steps,
            )
            asked = {method.name: method.extra_rows(step) for method in self.methods}
            self._extras = {name: extra for name, extra in asked.items() if extra is not None}
            self._step_rows = []
            for name, extra in self._extras.items():
                if extra.way == "replace":
                    batches = self._replace(batches, extra, step.random(f"{name}/places"))
                    items = self._get_num_items_in_batch(batches, *args)
            for name, extra in self._extras.items():
                if extra.way == "task":
                    tokens = torch.tensor(float(sum(int(supervised_tokens(b["labels"])) for b in batches)))
                    step.rehearsal_tokens[name] = int(process.all_reduce_sum(tokens.double()))
                elif extra.way == "beside":
                    self._put_beside(batches, extra, step, name)
            self.cost.tokens += sum(count_tokens(batch) for batch in batches)
            return batches, items

        def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
            loss = super().training_step(*args, **kwargs)
            if not self.is_deepspeed_enabled and self.accelerator.gradient_state.sync_gradients:
                self._after_backward()
            return loss

        def _after_backward(self) -> None:
            """Hand the accumulated gradient to the methods; DeepSpeed, which steps in its backward pass, calls this."""
            if self._step is None:
                return
            average_replicated(self.model)
            gradient = gradients(self.model)
            for method in self.methods:
                values = method.after_backward(self._step, gradient)
                self._terms.add(values)
                self._terms.as_gradients |= values.keys() & set(self._terms.declared)
            if self._engine is not None:  # it steps before Trainer asks for the norm
                self._norm = self._finite(math.sqrt(gradient.dot(gradient)))

        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None, **kwargs: Any
        ) -> Any:
            step = self._step
            if step is None or not model.training:
                return super().compute_loss(model, inputs, return_outputs, num_items_in_batch, **kwargs)
            extra = inputs.pop("rehearsal", {})
            rows = inputs.pop("row", None)
            self._step_rows += [] if rows is None else rows.tolist()
            together = extra if self._fits_together(inputs, extra) else {}
            joined = self._joined(inputs, together) | self._wanted(together)
            if return_outputs or together or self._outputs_are_read():
                loss, outputs = super().compute_loss(model, joined, True, num_items_in_batch, **kwargs)
            else:
                loss, outputs = super().compute_loss(model, joined, False, num_items_in_batch, **kwargs), None
            step.rehearsed = self._rehearse(model, inputs, outputs, extra, bool(together), step)
            # The task's loss is this micro-batch's share of the step's mean if Trainer has scaled it so; otherwise a
            # mean that training_step divides by the number of micro-batches. The extra terms must come out the same.
            scale = 1 / self._micro_batches if self._is_scaled(num_items_in_batch) else 1.0
            terms = {"task": loss}
            for method in self.methods:
                for name, term in method.loss_terms(step, inputs, outputs).items():
                    self._terms.check_gradient(step.stage, method, name, term)
                    terms[name] = scale * term
            total = sum(terms.values())
            if isinstance(model, DistributedDataParallel):
                total = _Reach.apply(total, *trainable(self.model).values())
            if not torch.isfinite(total):
                self._stop_before_update(terms, [] if rows is None else rows.tolist())
            share = 1.0 if self._is_scaled(num_items_in_batch) else 1 / self._micro_batches
            self._terms.add({name: share * term.detach() for name, term in terms.items()}, mean=False)
            return (total, outputs) if return_outputs else total

        def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
            if "loss" in logs:
                logs |= self._terms.flush(self._process)
                # Trainer's figure lacks the declared terms that came as gradients.
                logs["loss"] += sum(logs.get(f"term/{name}", 0.0) for name in self._terms.as_gradients)
            super().log(logs, *args, **kwargs)

        def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
            if self._engine is not None:
                return self._norm
            return self._finite(super()._get_grad_norm(model, grad_norm=grad_norm))

        def _finite(self, norm: float | None) -> float | None:
            if self._step is not None and norm is not None and not math.isfinite(norm):
                self._stop_before_update({"gradient norm": norm}, self._step_rows)
            return norm

        def _stop_before_update(self, terms: dict[str, Any], rows: list[int]) -> None:
            assert self._step is not None
            stage = self._step.stage
            values = ", ".join(f"{name} {float(torch.as_tensor(value).detach()):.4g}" for name, value in terms.items())
            where = f", {self._describe_rows(rows)}" if rows else ""
            raise NonFiniteLossError(
                f"stage {stage.index} ({stage.task}), step {self._step.index + 1}{where}: the loss is not finite "
                f"({values}); the weights were not touched. A lower training.learning_rate or a look at these rows "
                "would be next"
            )

        def _is_scaled(self, num_items_in_batch: Any) -> bool:
            said = getattr(self, "loss_is_scaled_for_ga", None)
            if said is not None:
                return said
            return (self.model_accepts_loss_kwargs and num_items_in_batch is not None) or (
                self.compute_loss_func is not None
            )

        def _outputs_are_read(self) -> bool:
            own_terms = (m for m in self.methods if type(m).loss_terms is not Method.loss_terms)
            return any(m.reads_outputs for m in own_terms) or any(e.way == "task" for e in self._extras.values())

        def _fits_together(self, inputs: Any, extra: dict[str, Batch]) -> bool:
            """Whether task and rehearsal rows may share a forward pass, and it is cheaper than one of each."""
            if not extra or set(inputs) != ROW_KEYS or inputs["attention_mask"].dim() > 2 or not self._one_pass:
                return False
            sizes = [batch["input_ids"].shape for batch in (inputs, *extra.values())]
            tokens = sum(rows for rows, _ in sizes) * max(seq for _, seq in sizes)
            return tokens <= (0 if self.args.device.type == "cpu" else ONE_PASS_TOKENS)

        def _joined(self, inputs: Any, extra: dict[str, Batch]) -> Batch:
            """One batch of both; rehearsal rows have no labels, so the task's loss passes them over."""
            joined = dict(inputs)
            for batch in extra.values():
                unlabelled = {key: batch[key] for key in ROW_KEYS} | {"labels": torch.full_like(batch["labels"], -100)}
                joined = concat(joined, unlabelled, 0)
            return joined

        def _wanted(self, extra: dict[str, Batch]) -> dict[str, Any]:
            """What the task's forward pass, with these rehearsal rows in it, must be asked for."""
            asked = [e for name, e in self._extras.items() if name in extra or e.way == "task"]
            return {"output_hidden_states": True} if any(e.layers for e in asked) else {}

        def _rehearse(
            self, model: Any, inputs: Any, outputs: Any, extra: dict[str, Batch], together: bool, step: Step
        ) -> dict[str, Rehearsed]:
            """Sort the outputs for the rehearsal rows by method, from the joint forward pass or from one of their own.

            After a joint pass ``outputs`` is cut down to the task's rows.
            """
            if together and not _trainable(outputs.get("logits")):
                # This trainer's loss makes no logits, or makes them again without gradient (TRL's fused head): from
                # now on rehearsal rows go by themselves.
                self._one_pass = together = False
            rehearsed = {}
            first = start = len(inputs["input_ids"])
            for name, asked in self._extras.items():
                batch = inputs if asked.way == "task" else extra.get(name)
                if batch is None:
                    continue
                own, place = outputs, 0
                if asked.way != "task" and together:
                    place, start = start, start + len(batch["input_ids"])
                elif asked.way != "task" or not _has(outputs, asked):
                    own = self._forward(model, batch, asked)
                rehearsed[name] = self._rehearsed(name, batch, own, place, step)
            if together:
                outputs["logits"] = outputs.logits[:first]
                outputs["hidden_states"] = None
            return rehearsed

        def _forward(self, model: Any, batch: Batch, asked: Extra) -> Any:
            """A forward pass of rehearsal rows by themselves, for what the method needs of it.

            Not every process has some, so DDP, which lets processes wait for each other in its forward pass, is left
            out: it has seen the task's rows, and all gradients come through it (:class:`_Reach`).
            """
            model = self.model if isinstance(model, DistributedDataParallel) else model
            states = {"output_hidden_states": True} if asked.layers else {}
            kept = {} if asked.logits else hidden_only(self.model)
            known = {key: batch[key] for key in ("input_ids", "attention_mask", "position_ids") if key in batch}
            return model(**known, use_cache=False, **states, **kept)

        def _rehearsed(self, name: str, batch: Batch, outputs: Any, start: int, step: Step) -> Rehearsed:
            asked, labels, counts = self._extras[name], batch["labels"], batch.get("counts", True)
            rows, seq = labels.shape
            part = slice(start, start + rows)
            return Rehearsed(
                samples=batch["sample"].tolist() if "sample" in batch else [],
                labels=labels,
                logits=outputs.logits[part, :seq] if asked.logits else None,
                hidden=tuple(outputs.hidden_states[layer][part, :seq] for layer in asked.layers),
                share=counts * step.micro_batches * int(supervised_tokens(labels)) / step.rehearsal_tokens[name],
                counts=counts,
                made=outputs.logits if asked.way == "task" and _full(outputs, labels) else None,
                batch=batch,
            )

        def _collate_rows(self, rows: Sequence[TokenRow]) -> Batch:
            return self._prepare_input(self._collate(rows))

        def _collate(self, rows: Sequence[TokenRow]) -> Batch:
            return self._pad([{key: row[key] for key in ("input_ids", "labels")} for row in rows])

        def _put_beside(self, batches: list[Any], extra: Extra, step: Step, name: str) -> None:
            samples = list(extra.samples) if extra.samples is not None else list(range(len(extra.rows)))
            rank, world = (0, 1) if extra.dealt else (self._process.rank, self._process.world)
            # What all processes have, each counts by itself, without waiting for the others.
            tokens = 0 if extra.dealt else sum(label != -100 for row in extra.rows for label in row["labels"][1:])
            for number, batch in enumerate(batches):
                part = slice(number * world + rank, None, len(batches) * world)
                rows = extra.rows[part]
                if rows or self._together:
                    collated = self._collate(rows or extra.rows[:1])
                    tokens += int(supervised_tokens(collated["labels"])) if extra.dealt and rows else 0
                    collated["sample"] = torch.tensor(samples[part] if rows else samples[:1])
                    collated["counts"] = bool(rows)  # others need this process to go along with their rows, if not
                    batch.setdefault("rehearsal", {})[name] = collated
            if extra.dealt:
                tokens = int(self._process.all_reduce_sum(torch.tensor(tokens, dtype=torch.float64)))
            step.rehearsal_tokens[name] = tokens

        def _drop_repeated(self, batches: list[Any]) -> list[int]:
            """Take out the rows that accelerate repeats to even out an epoch's last batches.

            Where a micro-batch has no other rows, one stays, of which nothing is learned.

            Returns:
                how many rows of each batch count; empty where none is repeated.
            """
            process, loader = self._process, self.callback_handler.train_dataloader
            if process.world == 1 or not has_length(loader) or not has_length(self.train_dataset):
                return []
            accumulated, size = self.args.gradient_accumulation_steps, self._train_batch_size
            first = self.state.global_step % math.ceil(len(loader) / accumulated) * accumulated
            if (first + len(batches)) * process.world * size <= len(self.train_dataset):
                return []
            sizes = []
            for number, batch in enumerate(batches):
                start = ((first + number) * process.world + process.rank) * size
                kept = min(size, max(0, len(self.train_dataset) - start))
                sizes.append(kept)
                batches[number] = {key: value[: max(kept, 1)] for key, value in batch.items()}
                if not kept:
                    batches[number]["labels"] = torch.full_like(batches[number]["labels"], -100)
            return sizes

        def _replace(self, batches: list[Any], extra: Extra, chance: random.Random) -> list[Any]:
            """Put the extra rows in random places of the step, instead of the rows that stood there."""
            if any(is_packed(batch) for batch in batches):
                raise ConfigError(
                    "way replace: rows that share a sequence cannot be replaced one by one; use way beside, or turn "
                    "packing off"
                )
            process, rows = self._process, extra.rows
            if extra.dealt:
                rows = [row for part in zip_longest(*process.gather(list(rows))) for row in part if row is not None]
            sizes = process.gather(self._sizes)
            places = [(b, w, r) for b in range(len(batches)) for w in range(process.world) for r in range(sizes[w][b])]
            taken = sorted(chance.sample(range(len(places)), min(len(rows), len(places))))
            chosen = {places[place]: row for place, row in zip(taken, rows, strict=False)}
            result = []
            for b, batch in enumerate(batches):
                size = len(batch["input_ids"])
                kept = [r for r in range(size) if (b, process.rank, r) not in chosen]
                new = [chosen[b, process.rank, r] for r in range(size) if r not in kept]
                parts = [{key: value[kept] for key, value in batch.items()}] if kept else []
                if new:
                    parts.append(self._collate(new))
                both = len(parts) == 2
                result.append(concat(parts[0], parts[1], self._pad.pad_token_id) if both else parts[0])
            return result

    Continual.__name__ = Continual.__qualname__ = f"Continual{trainer_class.__name__}"
    Continual.__doc__ = f"{trainer_class.__name__} with methods against forgetting; see :func:`continual`."
    return Continual


def _built(method: Choice) -> Method:
    if isinstance(method, Method):
        return method
    options = {"name": method} if isinstance(method, str) else dict(method)
    if "name" not in options:
        raise ConfigError(f"method: {options} has no name")
    return build([(options.pop("name"), options)])[0]


def _pad_token_id(tokenizer: Any, collator: Any) -> int:
    """The padding token; any will do where there is none, since padding is masked."""
    known = (getattr(source, "pad_token_id", None) for source in (tokenizer, collator))
    return next((token for token in known if token is not None), 0)


def _has(outputs: Any, asked: Extra) -> bool:
    """Whether a forward pass gave what a method needs."""
    states = outputs.get("hidden_states") or (None,)
    return not (asked.logits and not _trainable(outputs.get("logits"))) and not (
        asked.layers and not _trainable(states[-1])
    )


def _full(outputs: Any, labels: Tensor) -> bool:
    """Whether a forward pass gave trainable logits of every position."""
    logits = outputs.get("logits")
    return _trainable(logits) and logits.shape[:2] == labels.shape


def _trainable(tensor: Any) -> bool:
    return isinstance(tensor, Tensor) and tensor.requires_grad


class _Reach(torch.autograd.Function):
    """A loss, which every given parameter seems to have a part in.

    DDP waits for the gradients of all parameters. It looks for those that the forward pass did not use, but counts
    among them what a method's term uses beside it; so it is not asked to look, and told that all are used.
    """

    @staticmethod
    def forward(ctx: Any, loss: Tensor, *parameters: Tensor) -> Tensor:
        ctx.count = len(parameters)
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return (*gradients, *[None] * ctx.count)


class _AfterStep(TrainerCallback):
    """Hands the weights to the methods after each optimizer step."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        trainer._terms.step()
        if trainer._step is not None:
            for method in trainer.methods:
                if type(method).after_step is not Method.after_step:
                    method.after_step(trainer._step, weights(trainer.model))


ContinualTrainer = continual(Trainer)
"""transformers.Trainer with methods against forgetting."""
