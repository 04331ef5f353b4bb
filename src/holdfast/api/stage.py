"""A stage and its optimizer steps: what a method may know of the training that it belongs to."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from holdfast.api.rows import Batch, TokenRow
from holdfast.engines.process import Process

if TYPE_CHECKING:
    from torch import Tensor, nn

    from holdfast.engines.shards import Shards


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
    rows: Sequence[TokenRow]
    collate: Callable[[Sequence[TokenRow]], Batch]
    seed: int
    micro_batch_size: int
    folder: Path = Path()
    tokenizer: Any = None
    rows_a_step: int = 1

    def random(self, purpose: str) -> random.Random:
        """A generator of random choices that depends on seed, stage and purpose alone."""
        return random.Random(f"{self.seed}/{self.index}/{purpose}")

    def hidden_states(self, rows: Sequence[TokenRow], layer: int = -1) -> list[Tensor]:
        """Hidden states of the model as it is now, without dropout or gradient.

        Args:
            layer: -1 for the last one, after the final norm, from which the head makes the logits; 0 for the
                embeddings; otherwise after that layer.

        Returns:
            one tensor a row, [tokens, hidden], in the model's data type.
        """
        import torch

        from holdfast.models.head import hidden_only

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

    def gradient(self, rows: Sequence[TokenRow]) -> Shards:
        """Gradient of the mean next-token loss over all supervised tokens of ``rows`` at the current weights.

        Each process goes through its share of the rows. Gradients that are being accumulated stay untouched.
        """
        from holdfast.engines.vectors import gradient_of_sum

        return gradient_of_sum(self._losses(rows), self.model)

    def gradients(self, groups: Sequence[Sequence[TokenRow]]) -> Shards:
        """A stack of :meth:`gradient`, one a group of rows."""
        from holdfast.engines.vectors import gradients_of_sums

        return gradients_of_sums(map(self._losses, groups), self.model)

    def _losses(self, rows: Sequence[TokenRow]) -> Iterator[Tensor]:
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

    rows: Sequence[TokenRow]
    way: Literal["beside", "replace", "task"]
    samples: Sequence[int] | None = None
    layers: tuple[int, ...] = ()
    logits: bool = True
    dealt: bool = False
