"""The whole contract of a method: small verbs, all optional, and state that can be saved."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from holdfast.config import Section, validate
from holdfast.process import Process

if TYPE_CHECKING:
    from torch import Tensor, nn

    from holdfast.data.task import Example, Task
    from holdfast.evaluation.at_test import Evaluation
    from holdfast.shards import Shards

Row = Mapping[str, Any]
"""One tokenised row: ``input_ids`` and ``labels``, lists of int; -100 where a token is not supervised."""

Batch = dict[str, Any]
"""Collated rows: ``input_ids``, ``attention_mask``, ``labels``, int64 tensors [batch, seq], on the model's device."""


@dataclass
class Stage:
    """Training on one task, and what a method may know of it.

    Attributes:
        index: 1 for the first stage.
        task: name of the task; "joint" where all tasks are learned together.
        model: the model with its tuner; its weights are those that the last stage ended with.
        tokenizer: the model's tokenizer, where the trainer knows it.
        rows: the task's train rows.
        collate: turns rows into a batch on the model's device.
        seed: of the run; use :meth:`random` or :meth:`Step.random` for choices, so that a resumed run repeats them.
        micro_batch_size: rows that fit into one forward pass, in each process.
        folder: where a method may keep files for as long as the run lives.
        rows_a_step: task rows of a full optimizer step, of all processes.
    """

    index: int
    task: str
    model: nn.Module
    rows: Sequence[Row]
    collate: Callable[[Sequence[Row]], Batch]
    seed: int
    micro_batch_size: int
    folder: Path = Path()
    tokenizer: Any = None
    rows_a_step: int = 1

    def random(self, purpose: str) -> random.Random:
        """A generator of random choices that depends on seed, stage and purpose alone."""
        return random.Random(f"{self.seed}/{self.index}/{purpose}")

    def hidden_states(self, rows: Sequence[Row], layer: int = -1) -> list[Tensor]:
        """Hidden states of the model as it is now, without dropout or gradient.

        Args:
            layer: -1 for the last one, after the final norm, from which the head makes the logits; 0 for the
                embeddings; otherwise after that layer.

        Returns:
            one tensor a row, [tokens, hidden], in the model's data type.
        """
        import torch

        from holdfast.model import hidden_only

        training = self.model.training
        self.model.eval()
        states: list[Tensor] = []
        with torch.no_grad():
            for start in range(0, len(rows), self.micro_batch_size):
                part = rows[start : start + self.micro_batch_size]
                batch = self.collate(part)
                batch.pop("labels")
                outputs = self.model(**batch, output_hidden_states=True, **hidden_only(self.model))
                hidden = outputs.hidden_states[layer]
                states += [h[: len(row["input_ids"])] for h, row in zip(hidden, part, strict=True)]
        self.model.train(training)
        return states

    def gradient(self, rows: Sequence[Row]) -> Shards:
        """Gradient of the mean next-token loss over all supervised tokens of ``rows`` at the current weights.

        Each process goes through its share of the rows. Gradients that are being accumulated stay untouched.
        """
        from holdfast.shards import gradient_of_sum

        return gradient_of_sum(self._losses(rows), self.model)

    def gradients(self, groups: Sequence[Sequence[Row]]) -> Shards:
        """A stack of :meth:`gradient`, one a group of rows."""
        from holdfast.shards import gradients_of_sums

        return gradients_of_sums(map(self._losses, groups), self.model)

    def _losses(self, rows: Sequence[Row]) -> Iterator[Tensor]:
        """This process's share, one micro-batch at a time, of the mean next-token loss of rows."""
        from holdfast.losses.next_token import next_token_nll

        assert rows, "no rows"
        process, size = Process.this(), self.micro_batch_size
        tokens = sum(label != -100 for row in rows for label in row["labels"][1:])
        own = rows[process.rank :: process.world]
        for start in range(0, math.ceil(len(rows) / process.world), size):
            # A process that has no rows left goes along, since others may need it for their weights.
            batch = self.collate(own[start : start + size] or rows[:1])
            labels = batch.pop("labels")
            nll, _ = next_token_nll(self.model(**batch).logits, labels)
            yield nll * (1 / tokens if start < len(own) else 0.0)


@dataclass
class Rehearsed:
    """Rehearsal rows of a micro-batch after the model's forward pass.

    Attributes:
        samples: which of the rows that :class:`Extra` named each one is, [rows].
        labels: int64 [rows, seq]; -100 where not supervised.
        logits: [rows, seq, vocab], with gradient; None where the method asked for hidden states only.
        hidden: [rows, seq, hidden], with gradient, for each layer that the method asked for, in its order.
        made: [rows, seq, vocab], with gradient: the logits that the task's own loss has made of these rows, whether or
            not the method asked for logits; None where there are none.
        share: what the mean over this micro-batch's supervised tokens counts in the mean over micro-batches, so that
            the step's term is the mean over all its tokens, however its rows fall into micro-batches.
        batch: the rows themselves.
        counts: whether they count; otherwise, at share 0, this process goes along for the sake of others' rows.
    """

    samples: list[int]
    labels: Tensor
    logits: Tensor | None
    hidden: tuple[Tensor, ...]
    share: float
    made: Tensor | None = None
    batch: Batch = field(default_factory=dict)
    counts: bool = True


@dataclass
class Step:
    """One optimizer step, made of one or more micro-batches.

    Attributes:
        stage: the stage that it belongs to.
        index: 0 for the first optimizer step of the stage.
        rows: task rows in this step, of all processes.
        micro_batches: micro-batches in this step, of all processes.
        logged: whether this step's values are written to the log, so that they need computing.
        rehearsed: by method name, what the model made of the rehearsal rows of the current micro-batch.
        rehearsal_tokens: by method name, supervised rehearsal tokens of the whole step.
    """

    stage: Stage
    index: int
    rows: int
    micro_batches: int
    logged: bool
    rehearsed: dict[str, Rehearsed] = field(default_factory=dict)
    rehearsal_tokens: dict[str, int] = field(default_factory=dict)

    def random(self, purpose: str) -> random.Random:
        """A generator of random choices that depends on seed, stage, step and purpose alone."""
        return random.Random(f"{self.stage.seed}/{self.stage.index}/{self.index}/{purpose}")


@dataclass(frozen=True)
class Extra:
    """Rows that go with one optimizer step: ``beside`` the task's rows, or to ``replace`` as many of them.

    Attributes:
        rows: tokenised rows.
        way: ``beside``: they go through the model along with the task's rows and come back as :class:`Rehearsed`;
            ``replace``: they take the places of task rows; ``task``: there are none, and the task's own rows come
            back as :class:`Rehearsed`.
        samples: a number for each row by which the method knows it again; 0, 1, ... where absent.
        dealt: whether these are every so many-th rows, this process's own; otherwise all processes have the same.
        layers: hidden states that the method needs, as in :meth:`Stage.hidden_states`.
        logits: whether the method needs logits.
    """

    rows: Sequence[Row]
    way: Literal["beside", "replace", "task"]
    samples: Sequence[int] | None = None
    layers: tuple[int, ...] = ()
    logits: bool = True
    dealt: bool = False


State = dict[str, Any]
"""A method's memory: names to tensors (saved as safetensors) or plain values (saved as JSON)."""


def learned(batch: Batch) -> int:
    """How many of a batch's rows, from the front, are the task's own: none, where nothing in it is supervised."""
    return len(batch["input_ids"]) if bool((batch["labels"] != -100).any()) else 0


class Method:
    """What is done against forgetting.

    A subclass sets ``name``, documents its paper and equation, and overrides the verbs that it needs. It never steps
    the optimizer, never unwraps the engine and never asks which engine it runs on.
    """

    name: ClassVar[str]
    schedule: ClassVar[Literal["sequence", "joint", "none"]] = "sequence"
    """sequence: a stage a task; joint: one stage over all tasks; none: no training."""

    tuners: ClassVar[tuple[str, ...]] = ()
    """The tuners that it works with, the default first; any where empty."""

    tuners_reason: ClassVar[str] = ""
    """Why it works with these alone."""

    default_tuner: ClassVar[str] = "lora"
    """The default of a method that works with any."""

    not_with: ClassVar[Mapping[str, str]] = {}
    """Methods, by name, with which it cannot be applied together, each with the reason."""

    reads_outputs: ClassVar[bool] = True
    """Whether :meth:`loss_terms` reads ``outputs``; some trainers make them only when they are asked to."""

    class Options(Section):
        """The method's options; a key that it does not know is refused."""

    registry: ClassVar[dict[str, type[Method]]] = {}

    def __init_subclass__(cls, registered: bool = True, **kwargs: Any) -> None:
        """Make the class known by its ``name``; with ``registered=False`` users cannot choose it (a companion)."""
        super().__init_subclass__(**kwargs)
        name = cls.__dict__.get("name")
        if name is None or not registered:
            return
        other = Method.registry.get(name)
        if other is not None and (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
            raise TypeError(f"two methods are called {name!r}: {other.__module__} and {cls.__module__}")
        Method.registry[name] = cls

    def __init__(self, **options: Any) -> None:
        """Raises ConfigError if an option is unknown or wrong."""
        self.options: Any = validate(self.Options, options, f"method {self.name}")

    def before_stage(self, stage: Stage) -> None:
        """Build what the stage needs: teacher, caches, constraints. The weights are still the last stage's."""

    def declares(self, stage: Stage) -> tuple[str, ...]:
        """Names of the loss terms that this stage will have. Each must contribute, or the run stops with an error."""
        return ()

    def extra_rows(self, step: Step) -> Extra | None:
        """Rows that go with this optimizer step."""
        return None

    def loss_terms(self, step: Step, batch: Batch, outputs: Any) -> dict[str, Tensor]:
        """Extra terms of the loss, each a scalar with gradient: the mean over this micro-batch.

        The trainer averages them over the micro-batches of the step and adds them to the task's loss.
        """
        return {}

    def after_backward(self, step: Step, gradients: Shards) -> dict[str, float]:
        """Change the accumulated gradient in place, before clipping; return values to log.

        A declared term that is added here as a gradient is returned with its value.
        """
        return {}

    def after_step(self, step: Step, weights: Shards) -> None:
        """See or change the weights in place, after the optimizer's step."""

    def final_weights(self, stage: Stage) -> None:
        """Change the weights that the stage ends with: these are measured, saved, and what the next stage starts from.

        It comes before any method's :meth:`after_stage`.
        """

    def after_stage(self, stage: Stage) -> None:
        """Update the memory. The weights are those that the stage ended with."""

    def ask(self, evaluation: Evaluation, task: Task, example: Example, fits: Callable[[Example], bool]) -> Example:
        """What the model is asked at test time instead of a test example, such as the same after some demonstrations.

        Args:
            fits: whether an example fits into the model's context with room for a response and nothing cut.
        """
        return example

    def at_test(self, evaluation: Evaluation, rows: Sequence[Row]) -> Iterator[Sequence[int]]:
        """Make the model ready to answer test rows whose task is not known, some at a time.

        Yields the numbers of the rows that the model, as it then is, answers next; every row once. Until the next are
        asked for, these are answered; at the end, and when it is closed early, the model is as it was before.

        Args:
            rows: ``input_ids`` of a prompt, or, where only a likelihood is asked for, of prompt and answer together
                with ``labels``; :func:`holdfast.evaluation.at_test.prompt` gives what may be looked at.
        """
        yield range(len(rows))

    def state(self) -> State:
        """What must survive a restart: it is saved with every checkpoint and at the end of every stage."""
        return {}

    def load_state(self, state: State, model: nn.Module) -> None:
        """Take back what :meth:`state` gave; its tensors lie on the CPU."""
