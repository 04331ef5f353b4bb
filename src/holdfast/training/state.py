"""What a continual trainer keeps: one object, at one attribute of the trainer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from holdfast.api.method import Method
from holdfast.api.rows import IGNORED, TokenRow
from holdfast.api.stage import Encode, Stage, Step
from holdfast.data.collate import Collator
from holdfast.engines import zero
from holdfast.engines.process import Process
from holdfast.engines.vectors import average_replicated, gradients, momentum, weights
from holdfast.errors import NonFiniteLossError
from holdfast.system.progress import Show, silent
from holdfast.training.batches import is_token_batch, list_row_numbers
from holdfast.training.cost import Cost
from holdfast.training.extra_rows import OWN, ExtraRows
from holdfast.training.loss_weights import aligned_logits, check_plain_loss, combined_weights, has_logits, weighted_nll
from holdfast.training.requirements import reads_outputs
from holdfast.training.terms import Terms


@dataclass(frozen=True)
class RunContext:
    """What a run tells its trainer beyond a Trainer's own arguments.

    Attributes:
        rows: the task's train rows as methods see them; where absent, those of ``train_dataset``, each collated alone.
        dev: the rows of its dev split; where absent, those of ``eval_dataset``.
        describe_rows: how a message names train rows, given by number from 0.
        states: folder that the methods' states were loaded from since the last stage; they are loaded once more after
            an engine has divided the model.
        folder: where methods may keep files; where absent, ``rehearsal`` in ``output_dir``.
        tokenizer: the model's; where absent, the trainer's ``processing_class``.
        encode: makes rows of examples as those of its tasks were made.
    """

    rows: Sequence[TokenRow] | None = None
    dev: Sequence[TokenRow] | None = None
    describe_rows: Callable[[list[int]], str] = list_row_numbers
    states: Path | None = None
    folder: Path | None = None
    tokenizer: Any = None
    encode: Encode | None = None


@dataclass
class ContinualState:
    """The methods of a trainer, and where its training stands.

    Attributes:
        methods: those that are applied together, in the order in which they are called.
        task: name of the task that the next call of ``train()`` learns.
        stage_index: number of the next stage, from 1.
        run: what a run adds.
        process: this one.
        pad: makes a batch of token rows.
        is_run: whether a run or a laboratory run trains, and not a user's own program.
        optimizer_is_given: whether the user has given the optimizer.
        has_trained: whether ``train()`` was called before.
        overflow_is_skipped: whether fp16 leaves out a step whose gradients are not finite, and training goes on.
        interrupted: set while training runs, to say that it stops before the stage is done.
        check_stop, show: of the stage.
        cost: of the stage.
        terms: of the loss, since the last line of the log.
        stage: the one that is being trained; None between stages.
        extra_rows: of the stage; there are none before the first one.
        engine: DeepSpeed's, where it trains.
        general_loss_before: loss on held-out general text before the first stage, mean nats per token.
        step: the optimizer step at work; None before the first of the stage.
        micro_batches: of the step, in this process.
        row_numbers: of the step's train rows, in this process, where they are known.
        skipped: whether the step is left out, since fp16's gradients overflow.
        gathers: whether the task's loss is Trainer's own, and the same with the head on supervised tokens alone.
        knows_loss: whether Trainer's loss was found to be the next-token loss, in this stage, where a method weighs it.
        gradient_norm: of the step, where DeepSpeed trains.
    """

    methods: list[Method]
    task: str
    stage_index: int
    run: RunContext
    process: Process
    pad: Collator
    is_run: bool
    optimizer_is_given: bool
    has_trained: bool = False
    overflow_is_skipped: Callable[[], bool] = bool
    interrupted: bool = False
    check_stop: Callable[[], None] = lambda: None
    show: Show = silent
    cost: Cost = field(default_factory=Cost)
    terms: Terms = field(default_factory=Terms)
    stage: Stage | None = None
    extra_rows: ExtraRows = field(init=False, repr=False)
    engine: zero.Engine | None = None
    general_loss_before: float | None = None
    step: Step | None = None
    micro_batches: int = 1
    row_numbers: list[int] = field(default_factory=list)
    skipped: bool = False
    gathers: bool = False
    knows_loss: bool = False
    gradient_norm: float | None = None

    @property
    def task_name(self) -> str:
        """What the stage is called."""
        return self.task or f"stage {self.stage_index}"

    def any_overrides(self, *verbs: str) -> bool:
        """Whether a method has one of these verbs of its own."""
        return any(
            getattr(type(method), verb) is not getattr(Method, verb) for method in self.methods for verb in verbs
        )

    def names_of(self, verb: str) -> str:
        """The names of the methods that have this verb of their own."""
        own = (m for m in self.methods if getattr(type(m), verb) is not getattr(Method, verb))
        return " and ".join(method.name for method in own)

    @property
    def checks_finite(self) -> bool:
        """Whether a loss that is not finite ends the training: in a run, and where a method takes part in the steps.

        Otherwise training is Trainer's own, which goes on.
        """
        verbs = ("extra_rows", "loss_weights", "loss_terms", "after_backward", "after_step")
        return self.is_run or self.any_overrides(*verbs)

    @property
    def adds_to_loss(self) -> bool:
        """Whether a method may add rows or terms to the loss; if none does, batches are left as they are."""
        return self.any_overrides("extra_rows", "loss_terms")

    @property
    def held_out(self) -> list[TokenRow]:
        """General text that the methods hold out from rehearsal."""
        return [row for method in self.methods for row in method.held_out]

    @property
    def reads_logits(self) -> bool:
        """Whether a method may read the logits of every position of the task's rows."""
        return any(m.reads_all_logits for m in self._reading)

    @property
    def reads_outputs(self) -> bool:
        """Whether a method needs the outputs of the task's forward pass, which some trainers make only on demand."""
        return bool(self._reading) or any(extra.way in OWN for extra in self.extra_rows.by_method.values())

    @property
    def _reading(self) -> list[Method]:
        """The methods that read the outputs of the task's forward pass."""
        return [m for m in self.methods if reads_outputs(m) or type(m).loss_weights is not Method.loss_weights]

    def begin_step(self, index: int, sizes: Sequence[int], logged: bool, batches: Sequence[Any] = ()) -> Step:
        """Begin an optimizer step of these micro-batches with so many task rows each, in this process."""
        assert self.stage is not None
        counts = self.process.all_reduce_sum(torch.tensor([sum(sizes), len(sizes)], dtype=torch.float64))
        rows, micro_batches = counts.long().tolist()
        self.micro_batches, self.row_numbers, self.skipped = len(sizes), [], False
        self.step = Step(self.stage, index, rows, micro_batches, logged, batches=tuple(batches))
        return self.step

    def weighted_loss(
        self, loss: Tensor, model: Any, batch: Any, outputs: Any, longest: int, factor: Tensor | float
    ) -> Tensor:
        """The task's loss with the methods' weights.

        Where Trainer's loss made no logits of every token, as with a fused head, the rows pass through the model again.

        Args:
            loss: without them.
            model: as the engine wraps it.
            longest: tokens of a row in the forward pass.
            factor: what Trainer multiplies the sum over tokens by.

        Raises:
            ConfigError: it is not the next-token loss, or there are no logits.
            MethodError: weights are of a wrong shape.
        """
        assert self.step is not None
        names = self.names_of("loss_weights")
        if is_token_batch(batch) and not has_logits(outputs, longest):
            outputs, longest = self.extra_rows.task_pass(model, batch), batch["labels"].shape[1]
        logits = outputs["logits"] = aligned_logits(outputs, batch, longest, names)
        weights = combined_weights(self.methods, self.step, batch, outputs)
        if weights is None:
            return loss
        if not self.knows_loss:
            check_plain_loss(loss, logits, batch["labels"], factor, names)
            self.knows_loss = True
        return factor * weighted_nll(logits, batch["labels"], weights)

    def loss_terms(self, batch: Any, outputs: Any, scale: float) -> dict[str, Tensor]:
        """The methods' terms for a micro-batch, each multiplied by ``scale``.

        Raises:
            MethodError: a term is not declared or has no gradient.
        """
        assert self.step is not None
        terms: dict[str, Tensor] = {}
        for method in self.methods:
            for name, term in method.loss_terms(self.step, batch, outputs).items():
                self.terms.check_gradient(self.step.stage, method, name, term)
                terms[name] = scale * term
        return terms

    def after_backward(self, model: nn.Module, loss_scale: float = 1.0) -> None:
        """Give the accumulated gradient to the methods; DeepSpeed, which steps in its backward pass, calls this.

        Args:
            loss_scale: what fp16 has multiplied the gradient by. Methods see it without this factor, and it has the
                factor again afterwards. If it is not finite, they do not see it, since the step will be skipped.
        """
        if self.step is None:
            return
        average_replicated(model)
        scaled = self.engine is None and loss_scale != 1 and self.any_overrides("after_backward", "after_step")
        if self.engine is None and not (scaled or self.adds_to_loss or self.any_overrides("after_backward")):
            return  # a parameter without gradient stays without
        gradient = gradients(model)
        if scaled:
            finite = all(bool(t.isfinite().all()) for t in gradient.tensors.values())
            self.skipped = self.process.any_of(not finite)
            if self.skipped:
                return
            gradient.scale_(1 / loss_scale)
        for method in self.methods:
            values = method.after_backward(self.step, gradient)
            self.terms.add(values)
            self.terms.as_gradients |= values.keys() & set(self.terms.declared)
        if scaled:
            gradient.scale_(loss_scale)
        if self.engine is not None:  # it steps before Trainer asks for the norm
            self.gradient_norm = math.sqrt(gradient.dot(gradient)) / loss_scale
            self.check_finite(self.gradient_norm, {"gradient norm": self.gradient_norm}, self.row_numbers)

    def after_step(self, model: nn.Module, optimizer: Any) -> None:
        """Give the weights to the methods, after the optimizer's step, if it was not skipped."""
        self.terms.step()
        if self.step is not None and not self.skipped:
            self.step.momentum = partial(momentum, model, optimizer)
            for method in self.methods:
                if type(method).after_step is not Method.after_step:
                    method.after_step(self.step, weights(model))

    def end_stage(self, log: Sequence[Mapping[str, Any]], steps: int) -> None:
        """Let the methods set the weights that the stage ends with, and then update their memory.

        Args:
            log: the lines of the stage's log, those before a restart too.
            steps: optimizer steps of the stage.
        """
        assert self.stage is not None
        self.terms.remember(log, steps)
        self.terms.check(self.stage, self.process)
        for method in self.methods:
            method.final_weights(self.stage)
        for method in self.methods:
            method.after_stage(self.stage)
        self.stage_index += 1

    def check_finite(self, total: Any, values: dict[str, Any], rows: list[int], labels: Tensor | None = None) -> None:
        """Stop before the weights change if a scalar is not finite, unless such a step is skipped.

        Args:
            total: the scalar, a number or a tensor.
            values: what it consists of, by name, for the message.
            rows: numbers of the train rows that it comes from, where known.
            labels: of these rows, where known.

        Raises:
            NonFiniteLossError: it is not.
        """
        if self.step is None or not self.checks_finite or math.isfinite(torch.as_tensor(total).detach()):
            return
        if self.overflow_is_skipped():
            return
        stage = self.step.stage
        named = ", ".join(f"{name} {float(torch.as_tensor(value).detach()):.4g}" for name, value in values.items())
        where = f", {self.run.describe_rows(rows)}" if rows else ""
        advice = "A lower training.learning_rate or a look at these rows would be next"
        if labels is not None and not bool((labels != IGNORED).any()):
            advice = (
                f"No token of these rows is supervised: all their labels are {IGNORED}, so their mean loss is 0/0; "
                "look at what masks them (the data collator, completion_only_loss, assistant_only_loss, a prompt that "
                "fills the row), or leave them out"
            )
        raise NonFiniteLossError(
            f"stage {stage.index} ({stage.task}), step {self.step.index + 1}{where}: the loss is not finite "
            f"({named}); the weights were not touched. {advice}"
        )
