"""continual(TrainerClass): a method's hooks on any transformers Trainer, without a copied loop."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import has_length

from holdfast.api.method import Method
from holdfast.api.rows import TokenRow
from holdfast.api.stage import Stage
from holdfast.config.keep import KeepConfig
from holdfast.data.collate import Collator
from holdfast.engines.process import Process
from holdfast.engines.unused import leave_deepspeed_unimported
from holdfast.errors import ConfigError
from holdfast.losses.next_token import supervised_tokens
from holdfast.methods import build, check_together, in_turn
from holdfast.models.likelihood import token_losses
from holdfast.rehearsal.keep import Keep
from holdfast.training.batches import count_rows, count_tokens, count_written, drop_repeated_rows, is_token_batch
from holdfast.training.checkpoint import checkpoint_to_resume, read_complete
from holdfast.training.collated_rows import CollatedRows
from holdfast.training.cost import Cost
from holdfast.training.engine_mixin import (
    EngineMixin,
    ddp_expects_all,
    hand_to_engine,
    optimizer_not_saved,
    reach_all,
    renew_optimizer,
    scales_loss,
)
from holdfast.training.extra_rows import ExtraRows, Passed, collate_tokens
from holdfast.training.frozen_adapters import frozen_stays, reference_of_this_stage
from holdfast.training.method_state import load_states
from holdfast.training.pitfalls import check_pitfalls, tell_of_first_loss, watched
from holdfast.training.requirements import check_batches, check_learns_stages, check_methods, check_trainable
from holdfast.training.seq2seq import as_rows, take_seq2seq, to_pass
from holdfast.training.state import ContinualState, RunContext
from holdfast.training.steps import planned_steps
from holdfast.training.supervised_pass import may_gather, task_pass
from holdfast.training.terms import Terms

Choice = str | Mapping[str, Any] | Method

ONE_PASS_TOKENS = 4096
"""On an accelerator, task rows and extra rows of up to so many tokens share a forward pass, since launching its kernels
costs more than their arithmetic. On a CPU two passes were always cheaper (benchmarks/RESULTS.md)."""


PUBLIC = ("methods", "task", "stage_index", "interrupted", "cost")
"""Fields of the state that are attributes of the trainer, too, unless the wrapped class has one of that name."""


def continual(trainer_class: type) -> type:
    """Return a subclass of ``trainer_class`` that applies methods against forgetting.

    It takes three more arguments. ``method``: a name, a mapping ``{"name": ..., option: value}``, a :class:`Method`, or
    a list of these. ``keep``: a budget, such as ``{"general": "2%"}`` (:class:`KeepConfig`). ``task``: what the stage
    is called. Each call of ``train()`` is one stage: the methods build what
    they need before it and update their memory after it; set ``train_dataset`` and call it again for the next task.
    Everything that the class does otherwise stays as it is. A class that is continual already is returned itself.
    """
    if issubclass(trainer_class, ContinualMixin):
        return trainer_class
    public = {name: _StateField() for name in PUBLIC if not hasattr(trainer_class, name)}
    doc = f"{trainer_class.__name__} with methods against forgetting; see :func:`continual`."
    members = {"__doc__": doc, "__module__": __name__, **public}
    return type(f"Continual{trainer_class.__name__}", (ContinualMixin, trainer_class), members)


class ContinualMixin(EngineMixin):
    """Lets methods take part in a Trainer's training; it stands before the Trainer among the bases.

    It keeps its state in one attribute, ``_holdfast``; all other attributes belong to the Trainer. Its methods stand in
    the order in which training calls them.
    """

    def __init__(
        self,
        *args: Any,
        method: Choice | Sequence[Choice] = "sequential",
        keep: KeepConfig | Mapping[str, Any] | None = None,
        task: str = "",
        stage_index: int = 1,
        run_context: RunContext | None = None,
        **kwargs: Any,
    ) -> None:
        leave_deepspeed_unimported()
        given = (*args, *kwargs.values())
        with optimizer_not_saved(given), reference_of_this_stage(given):
            super().__init__(*args, **kwargs)
        take_seq2seq(self)
        methods = _built(method)
        if run_context is None:  # a run has checked its methods, beside which its tuner may have one of its own
            check_together(methods)
            check_learns_stages(methods)
        if keep is not None:
            methods.append(Keep(keep if isinstance(keep, KeepConfig) else dict(keep), methods))
        self._holdfast = ContinualState(
            methods=methods,
            task=task,
            stage_index=stage_index,
            run=run_context or RunContext(),
            process=Process.this(),
            pad=Collator(_pad_token_id(self.processing_class, self.data_collator)),
            is_run=run_context is not None,
            optimizer_is_given=self.optimizer is not None,
        )

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train one stage. The methods prepare it, set its final weights and update their memory."""
        state = self._holdfast
        checkpoint = checkpoint_to_resume(
            resume_from_checkpoint, Path(self.args.output_dir), state.stage_index, state.task_name
        )
        state.cost, state.interrupted = Cost(), False
        state.cost.start()
        try:
            _begin_stage(self, checkpoint)
            with _methods_after_step(self), ddp_expects_all(self), frozen_stays(self.model), watched(self):
                result = super().train(checkpoint, *args, **kwargs)
            if not state.interrupted:
                state.end_stage(self.state.log_history, self.state.global_step)
        finally:
            state.cost.stop()
            state.stage = state.step = None
            state.has_trained = True
        return result

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, *args: Any) -> tuple[list[Any], Any]:
        """Get the micro-batches of an optimizer step, and add the rows of methods."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, *args)
        batches = [as_rows(self, batch) for batch in batches]
        state, at = self._holdfast, self.state.global_step
        if state.stage is None or not batches:
            return batches, items
        if sizes := _drop_repeated_rows(self, batches):
            items = self._get_num_items_in_batch(batches, *args)
        sizes = sizes or [count_rows(batch, self._train_batch_size) for batch in batches]
        logged = (at + 1) % self.state.logging_steps == 0 or at + 1 == self.state.max_steps
        step = state.begin_step(at, sizes, logged, batches)
        extended = state.extra_rows.put_into(batches, sizes, step, state.methods)
        if extended is not batches:
            items = self._get_num_items_in_batch(extended, *args)
        apart = [batch for rows in state.extra_rows.apart for batch in rows.values()]
        state.cost.tokens += sum(count_tokens(batch) for batch in (*extended, *apart))
        return extended, items

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None, **kwargs: Any
    ) -> Any:
        """Compute the loss of a micro-batch, and add the terms of methods."""
        state, step, inputs = self._holdfast, self._holdfast.step, as_rows(self, inputs)
        kwargs |= {} if num_items_in_batch is None else {"num_items_in_batch": num_items_in_batch}
        if step is None or not model.training:
            return super().compute_loss(model, inputs, **_return_outputs(return_outputs), **kwargs)
        numbers = _take_row_numbers(self, inputs)
        state.row_numbers += numbers
        extra = state.extra_rows.take_from(inputs, self._prepare_input)
        state.cost.tokens += count_written(inputs)
        joint = state.extra_rows.joint(inputs, extra)
        passed = state.extra_rows.joined(inputs, joint) if state.adds_to_loss else to_pass(self, inputs)
        needs_outputs = return_outputs or bool(joint) or state.reads_outputs
        needs_logits = return_outputs or state.reads_logits or state.extra_rows.needs_all_logits(joint)
        gather = state.gathers and not needs_logits and is_token_batch(inputs)
        with task_pass(self.model, passed, len(inputs["labels"]) if joint else None, gather) as (batch, gathered):
            result = super().compute_loss(model, batch, **_return_outputs(needs_outputs), **kwargs)
        loss, outputs = result if needs_outputs else (result, None)
        made = Passed(outputs, gathered.done)
        step.rehearsed = state.extra_rows.rehearsed(model, inputs, made, extra, joint, step)
        # The task's loss is this micro-batch's share of the step's mean if Trainer has scaled it so; otherwise a mean
        # that training_step divides by the number of micro-batches. The methods' terms must come out the same.
        scaled = _is_scaled(self, num_items_in_batch)
        step.task_loss = _mean_loss(self, loss, inputs, num_items_in_batch) if scaled else loss.detach()
        if state.extra_rows.instead:  # whatever the trainer made of the rows that took the places of the task's
            loss = 0.0 * loss
        if state.any_overrides("loss_weights"):
            factor = _loss_factor(self, inputs, num_items_in_batch, scaled)
            longest = passed["labels"].shape[1] if is_token_batch(passed) else 0
            loss = state.weighted_loss(loss, model, inputs, outputs, longest, factor)
        terms = {"task": loss} | state.loss_terms(inputs, outputs, 1 / state.micro_batches if scaled else 1.0)
        total = reach_all(model, sum(terms.values()))
        state.check_finite(total, terms, numbers, inputs.get("labels") if isinstance(inputs, Mapping) else None)
        share = 1.0 if scaled else 1 / state.micro_batches
        state.terms.add({name: share * term.detach() for name, term in terms.items()}, mean=False)
        return (total, outputs) if return_outputs else total

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Run a micro-batch forward and backward; after the last one of a step, give the gradient to the methods."""
        loss = super().training_step(*args, **kwargs)
        if not self.is_deepspeed_enabled and self.accelerator.gradient_state.sync_gradients:
            self._holdfast.after_backward(self.model, loss_scale=_loss_scale(self))
        return loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        state = self._holdfast
        if state.engine is not None:
            return state.gradient_norm
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if norm is not None:
            state.check_finite(norm, {"gradient norm": norm}, state.row_numbers)
        return norm

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log a line, with the mean of every term of the loss since the last one."""
        state = self._holdfast
        if state.stage is not None and "loss" in logs:
            logs |= state.terms.flush(state.process)
            tell_of_first_loss(self, logs)
            # Trainer's loss lacks the declared terms that came as gradients.
            logs["loss"] += sum(logs.get(f"term/{name}", 0.0) for name in state.terms.as_gradients)
            logs |= {name: value for method in state.methods for name, value in method.watched().items()}
        super().log(logs, *args, **kwargs)

    def forgetting_report(self) -> dict[str, Any]:
        """What training did to general ability: the loss on general text that was held out from rehearsal.

        Returns:
            ``before`` the first stage and ``after`` (now), mean nats per token; ``change`` (positive is worse);
            ``texts``, how many there are.

        Raises:
            ConfigError: no method of this trainer rehearses general or self-generated samples.
        """
        before, after = self._holdfast.general_loss_before, _general_loss(self)
        if after is None or before is None:
            raise ConfigError(
                "forgetting_report: needs a method that rehearses general or self-generated samples, such as "
                '{"name": "gere", "path": ...}, and a call of train()'
            )
        texts = len(self._holdfast.held_out)
        return {"before": before, "after": after, "change": after - before, "texts": texts}

    def keep_report(self) -> dict[str, Any]:
        """Whether the last stage ended within its budget.

        Returns:
            ``kept``; ``constraints``, each with what was ``lost`` and its 95 % ``interval``, the ``budget`` and
            ``kept``; ``share`` of the stage's update, where some of it was given back.

        Raises:
            ConfigError: the trainer has no ``keep``, or has not finished a stage.
        """
        verdict = next((method.verdict for method in self._holdfast.methods if isinstance(method, Keep)), None)
        if verdict is None:
            raise ConfigError('keep_report: needs a budget, such as keep={"general": "2%"}, and a call of train()')
        return verdict


def _begin_stage(trainer: Any, checkpoint: str | None) -> None:
    """Make the stage, let an engine divide the model, let the methods prepare, and load what a checkpoint holds."""
    state = trainer._holdfast
    state.overflow_is_skipped = lambda: _overflow_is_skipped(trainer)
    stage = state.stage = _stage(trainer)
    check_trainable(trainer.model)
    check_methods(state.methods, trainer.model, stage.rows)
    check_batches(state.methods, lambda: _first_batch(trainer))
    if not state.is_run:
        check_pitfalls(trainer, _collator(trainer), stage)
    state.engine, state.knows_loss = None, False
    hand_to_engine(trainer)
    if state.engine is not None and state.run.states is not None:
        load_states(state.methods, state.run.states, trainer.model)  # again, divided as the weights are now
    joint_tokens = 0 if trainer.args.device.type == "cpu" else ONE_PASS_TOKENS
    state.extra_rows = ExtraRows(trainer.model, state.pad, state.process, joint_tokens)
    for method in state.methods:
        method.before_stage(stage)
        hand_to_engine(trainer)
    renew_optimizer(trainer)
    state.gathers = may_gather(trainer, super(ContinualMixin, trainer).compute_loss)
    if state.general_loss_before is None and not state.is_run:  # of which nobody asks for a forgetting_report
        state.general_loss_before = _general_loss(trainer)
    declared = [name for method in state.methods for name in method.declares(stage)]
    # Answers that are all worth the same move no weight, so that a distance from past weights stays zero.
    rewarded = declared if hasattr(trainer, "reward_funcs") else []
    state.terms = Terms(
        declared,
        may_rest=[*rewarded, *(name for method in state.methods for name in method.may_rest(stage))],
        may_be_absent=(name for method in state.methods for name in method.may_be_absent(stage)),
    )
    if checkpoint is not None:
        load_states(state.methods, Path(checkpoint, "method"), trainer.model)
        if state.process.main:
            state.cost.load(read_complete(Path(checkpoint), files=False)["cost"])


def _collator(trainer: Any) -> Callable[[list[Any]], Any]:
    collate = trainer._get_collator_with_removed_columns(trainer.data_collator)
    return lambda rows: as_rows(trainer, collate(rows))


def _stage(trainer: Any) -> Stage:
    state, run, args = trainer._holdfast, trainer._holdfast.run, trainer.args
    collator = _collator(trainer)
    rows_a_step = args.train_batch_size * args.gradient_accumulation_steps * state.process.world
    return Stage(
        index=state.stage_index,
        task=state.task_name,
        model=trainer.model,
        rows=run.rows if run.rows is not None else CollatedRows(trainer.train_dataset, collator),
        collate=lambda rows: trainer._prepare_input(collate_tokens(state.pad, rows)),
        seed=args.seed,
        micro_batch_size=args.per_device_train_batch_size,
        folder=run.folder or Path(args.output_dir, "rehearsal"),
        tokenizer=run.tokenizer or trainer.processing_class,
        rows_a_step=rows_a_step,
        steps=planned_steps(trainer, rows_a_step),
        dev=run.dev if run.dev is not None else _dev_rows(trainer, collator),
        check_stop=state.check_stop,
        show=state.show,
        encode=run.encode,
    )


def _dev_rows(trainer: Any, collator: Any) -> Sequence[TokenRow]:
    """The rows of a trainer's ``eval_dataset``, if it has one dataset of a known length."""
    dataset = trainer.eval_dataset
    return CollatedRows(dataset, collator) if has_length(dataset) and not isinstance(dataset, Mapping) else ()


def _first_batch(trainer: Any) -> Any:
    """A batch of the first train row; None where it cannot be had without beginning to read the rows."""
    dataset = trainer.train_dataset
    if not has_length(dataset) or not len(dataset) or not hasattr(dataset, "__getitem__"):
        return None
    with torch.random.fork_rng(devices=[]):  # a collator may draw random numbers
        return _collator(trainer)([dataset[0]])


def _loss_scale(trainer: Any) -> float:
    """What fp16 multiplies the loss, and so the gradients, by until the optimizer steps."""
    scaler = getattr(trainer.accelerator, "scaler", None)
    return 1.0 if scaler is None else scaler.get_scale()


def _overflow_is_skipped(trainer: Any) -> bool:
    """Whether fp16's loss scale makes the optimizer skip a step whose gradients are not finite, and falls.

    It does not where it has fallen below 1: then the gradients themselves are not finite.
    """
    if trainer.is_deepspeed_enabled:
        return scales_loss(trainer)  # DeepSpeed itself ends where its scale cannot fall any more
    return getattr(trainer.accelerator, "scaler", None) is not None and _loss_scale(trainer) >= 1


@contextlib.contextmanager
def _methods_after_step(trainer: Any) -> Iterator[None]:
    """Within it, methods get the weights after each optimizer step, before any callback of the user."""
    callback = _AfterStep(trainer)
    trainer.callback_handler.callbacks.insert(0, callback)
    try:
        yield
    finally:
        trainer.remove_callback(callback)


class _AfterStep(TrainerCallback):
    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        holdfast = self.trainer._holdfast
        # A fused optimizer leaves the step out by itself, so that accelerate does not know; DeepSpeed does.
        holdfast.skipped |= getattr(self.trainer.optimizer, "step_was_skipped", False)
        holdfast.after_step(self.trainer.model, self.trainer.optimizer)


def _drop_repeated_rows(trainer: Any, batches: list[Any]) -> list[int]:
    """Call :func:`.drop_repeated_rows` where several processes train; otherwise no row is repeated."""
    process, loader, dataset = (
        trainer._holdfast.process,
        trainer.callback_handler.train_dataloader,
        trainer.train_dataset,
    )
    if process.world == 1 or not has_length(loader) or not has_length(dataset):
        return []
    accumulated = trainer.args.gradient_accumulation_steps
    first = trainer.state.global_step % math.ceil(len(loader) / accumulated) * accumulated
    return drop_repeated_rows(batches, process, first, trainer._train_batch_size, len(dataset))


def _take_row_numbers(trainer: Any, inputs: Any) -> list[int]:
    """Remove from a batch the numbers of its rows, which holdfast's own collator puts there, and return them."""
    numbers = inputs.pop("row", None) if isinstance(trainer.data_collator, Collator) else None
    return [] if numbers is None else numbers.tolist()


def _return_outputs(wanted: bool) -> dict[str, bool]:
    """The argument of compute_loss that asks for outputs; Trainer leaves it out where it wants none."""
    return {"return_outputs": True} if wanted else {}


def _is_scaled(trainer: Any, num_items_in_batch: Any) -> bool:
    """Whether Trainer takes the loss for a share of the step's mean, and not for the mean of a micro-batch."""
    scaled = getattr(trainer, "loss_is_scaled_for_ga", None)
    if scaled is not None:
        return scaled
    return (trainer.model_accepts_loss_kwargs and num_items_in_batch is not None) or (
        trainer.compute_loss_func is not None
    )


def _mean_loss(trainer: Any, loss: Tensor, inputs: Any, num_items_in_batch: Any) -> Tensor:
    """The mean over a micro-batch's own tokens of a loss that Trainer takes for a share of the step's mean."""
    if num_items_in_batch is None or not is_token_batch(inputs):
        return loss.detach() * trainer._holdfast.micro_batches
    factor = _loss_factor(trainer, inputs, num_items_in_batch, scaled=True)
    return loss.detach() / (factor * supervised_tokens(inputs["labels"]).clamp(min=1))


def _loss_factor(trainer: Any, inputs: Any, num_items_in_batch: Any, scaled: bool) -> Tensor | float:
    """What Trainer multiplies the sum of a micro-batch's token losses by, to get the loss; nothing waits for a GPU."""
    if scaled and num_items_in_batch is not None:
        processes = trainer.accelerator.num_processes if trainer.args.average_tokens_across_devices else 1
        return processes / num_items_in_batch
    tokens = supervised_tokens(inputs["labels"]).clamp(min=1) if is_token_batch(inputs) else 1
    return 1 / (tokens * trainer._holdfast.micro_batches if scaled else tokens)


def _general_loss(trainer: Any) -> float | None:
    """Mean loss on the texts that methods hold out from rehearsal, nats per token; None where there are none."""
    state = trainer._holdfast
    if not state.held_out:
        return None
    nats, tokens = token_losses(
        trainer.model,
        state.held_out,
        batch_size=trainer.args.per_device_eval_batch_size,
        pad_token_id=state.pad.pad_token_id,
    )
    return float(nats.sum() / tokens.sum())


def _built(method: Choice | Sequence[Choice]) -> list[Method]:
    chosen = method if isinstance(method, list | tuple) else [method]
    methods = []
    for choice in chosen:
        if isinstance(choice, Method):
            methods.append(choice)
            continue
        options = {"name": choice} if isinstance(choice, str) else choice
        if not isinstance(options, Mapping) or not isinstance(options.get("name"), str):
            raise ConfigError(
                f'method: must be a name, such as "replay", a mapping with one, such as {{"name": "replay", "ratio": '
                f"0.1}}, a Method, or a list of these, not {choice!r:.200}"
            )
        methods += build([(options["name"], {key: value for key, value in options.items() if key != "name"})])
    return in_turn(methods)


def _pad_token_id(tokenizer: Any, collator: Any) -> int:
    """The padding token; any token will do where none is known, since padding is masked."""
    tokens = (getattr(source, "pad_token_id", None) for source in (tokenizer, collator))
    return next((token for token in tokens if token is not None), 0)


class _StateField:
    """A field of the trainer's state that reads and is set as an attribute of the trainer.

    A wrapped class that sets an attribute of the same name on its instances keeps it.
    """

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, trainer: Any, owner: type | None = None) -> Any:
        if trainer is None:
            return self
        attributes = vars(trainer)
        if self.name in attributes:
            return attributes[self.name]
        if "_holdfast" not in attributes:
            raise AttributeError(f"{type(trainer).__name__!r} object has no attribute {self.name!r}")
        return getattr(attributes["_holdfast"], self.name)

    def __set__(self, trainer: Any, value: Any) -> None:
        attributes = vars(trainer)
        if self.name in attributes or "_holdfast" not in attributes:
            attributes[self.name] = value
        else:
            setattr(attributes["_holdfast"], self.name, value)


ContinualTrainer = continual(Trainer)
"""transformers.Trainer with methods against forgetting."""
