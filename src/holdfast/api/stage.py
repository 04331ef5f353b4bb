"""A stage and its optimizer steps, as methods see them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Literal

from holdfast.api.rows import Batch, TokenRow, count_supervised
from holdfast.api.task import Example
from holdfast.engines.process import Process
from holdfast.system.device import to_float64
from holdfast.system.progress import Show, silent

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerBase

    from holdfast.engines.shards import Shards

Encode = Callable[[Sequence[Example]], Sequence[TokenRow]]
"""Examples -> their rows, in order; most have one."""


def _go_on() -> None:
    pass


def _no_momentum() -> Shards:
    raise AssertionError("no optimizer has stepped yet")


@dataclass
class Stage:
    """Training on one task.

    Attributes:
        index: 1 for the first stage.
        task: name of the task; "joint" if all tasks are learned together.
        model: the model with its tuner; its weights are those that the last stage ended with.
        rows: the task's train rows.
        collate: turns rows into a batch on the model's device.
        seed: of the run; use :meth:`random` or :meth:`Step.random` for choices, so that a resumed run repeats them.
        micro_batch_size: rows that fit into one forward pass, in each process.
        folder: a folder for a method's files; it lives as long as the run.
        tokenizer: the model's tokenizer, if the trainer knows it.
        rows_a_step: task rows of a full optimizer step, over all processes.
        steps: optimizer steps of the stage, about; None if nobody knows.
        dev: the task's dev split, on which nothing is trained; empty where there is none or no method asks for it.
        check_stop: for long work to call now and then: it raises Interrupted if the run was asked to stop and no step
            would be lost.
        show: for long work: shows what it is called and how far it is; use :meth:`bar`.
        encode: makes rows of examples as those of the task were made, with their pictures; None where nobody knows how.
    """

    index: int
    task: str
    model: nn.Module
    rows: Sequence[TokenRow]
    collate: Callable[[Sequence[TokenRow]], Batch]
    seed: int
    micro_batch_size: int
    folder: Path = Path()
    tokenizer: PreTrainedTokenizerBase | None = None
    rows_a_step: int = 1
    steps: int | None = None
    dev: Sequence[TokenRow] = ()
    check_stop: Callable[[], None] = field(default_factory=lambda: _go_on)
    show: Show = field(default_factory=lambda: silent)
    encode: Encode | None = None

    @contextmanager
    def bar(self, title: str) -> Iterator[Callable[[int, int], None]]:
        """Show some long work while it lasts, and stop it where the run was asked to: see ``check_stop``.

        Yields:
            a function to call now and then with the steps done and all steps.
        """
        self.check_stop()
        with self.show(title) as show:

            def on_step(done: int, total: int) -> None:
                self.check_stop()
                show(done, total)

            yield on_step

    def random(self, purpose: str) -> Random:
        """A generator of random choices that depends on seed, stage and purpose alone."""
        return Random(f"{self.seed}/{self.index}/{purpose}")

    def sample(self, count: int, choices: Random) -> list[TokenRow]:
        """``count`` train rows in random order, or all if there are fewer."""
        places = choices.sample(range(len(self.rows)), min(count, len(self.rows)))
        return [self.rows[place] for place in places]

    def hidden_states(self, rows: Sequence[TokenRow], layer: int = -1) -> list[Tensor]:
        """Hidden states of rows under the current weights, without dropout or gradient.

        Args:
            layer: -1: after the last layer and the final norm, which is the head's input; 0: the embeddings; otherwise
                after that layer.

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
                self.check_stop()
                part = rows[start : start + self.micro_batch_size]
                batch = self.collate(part)
                batch.pop("labels")
                outputs = self.model(**batch, output_hidden_states=True, **hidden_only(self.model))
                hidden = outputs.hidden_states[layer]
                states += [h[: len(row["input_ids"])] for h, row in zip(hidden, part, strict=True)]
        self.model.train(training)
        return states

    def losses(self, rows: Sequence[TokenRow]) -> tuple[list[float], list[int]]:
        """Negative log-likelihood of the supervised tokens of rows under the current weights, without dropout.

        Each process computes its share of the rows.

        Returns:
            of each row the sum in nats, and the number of its supervised tokens.
        """
        import torch

        from holdfast.engines.pieces import reshard
        from holdfast.losses.next_token import predicting, prediction_nll
        from holdfast.models.supervised import predictions

        process, size = Process.this(), self.micro_batch_size
        share, nats = rows[process.rank :: process.world], list[float]()
        training = self.model.training
        self.model.eval()
        with torch.no_grad():
            for start in range(0, math.ceil(len(rows) / process.world), size):
                self.check_stop()
                # A process without rows goes along, since the others may need its part of the weights.
                batch = self.collate(share[start : start + size] or rows[:1])
                labels = batch.pop("labels")
                nll = to_float64(prediction_nll(predictions(self.model, batch, labels, use_cache=False), labels))
                owners = predicting(labels).nonzero()[:, 0].to(nll.device)
                nats += nll.new_zeros(len(labels)).index_add(0, owners, nll).tolist()
        self.model.train(training)
        reshard(self.model)
        total = [0.0] * len(rows)
        for rank, part in enumerate(process.gather(nats[: len(share)])):
            total[rank :: process.world] = part
        return total, [count_supervised(row) for row in rows]

    def gradient(self, rows: Sequence[TokenRow]) -> Shards:
        """Gradient of the mean next-token loss over all supervised tokens of ``rows`` at the current weights.

        Each process computes its share of the rows. The gradients that training accumulates stay untouched.
        """
        from holdfast.engines.vectors import gradient_of_sum

        return gradient_of_sum(self._losses(rows), self.model)

    def gradients(self, groups: Sequence[Sequence[TokenRow]]) -> Shards:
        """A stack of :meth:`gradient`, one for each group of rows."""
        from holdfast.engines.vectors import gradients_of_sums

        return gradients_of_sums(map(self._losses, groups), self.model)

    def _losses(self, rows: Sequence[TokenRow]) -> Iterator[Tensor]:
        """This process's share of the mean next-token loss of rows, one micro-batch at a time."""
        from holdfast.losses.next_token import prediction_nll
        from holdfast.models.supervised import predictions

        assert rows, "no rows"
        process, size = Process.this(), self.micro_batch_size
        tokens = sum(map(count_supervised, rows))
        share = rows[process.rank :: process.world]
        for start in range(0, math.ceil(len(rows) / process.world), size):
            # A process without rows goes along, since the others may need its part of the weights.
            batch = self.collate(share[start : start + size] or rows[:1])
            labels = batch.pop("labels")
            nll = prediction_nll(predictions(self.model, batch, labels), labels).sum()
            yield nll * (1 / tokens if start < len(share) else 0.0)


@dataclass
class Rehearsed:
    """The rehearsal rows of a micro-batch after the model's forward pass.

    Attributes:
        samples: the number of each row, as :class:`Extra` gave them.
        labels: int64 [rows, seq]; -100 where not supervised.
        logits: with gradient, as the method asked for them: [rows, seq, vocab], of every position; [supervised tokens,
            vocab], row by row, of those that predict a supervised token; None if it asked for hidden states only.
        hidden: [rows, seq, hidden], with gradient, of each layer that the method asked for, in its order.
        share: factor on a mean over this micro-batch's supervised tokens, such that the mean over all micro-batches is
            the mean over all tokens of the step, however its rows fall into micro-batches.
        task_logits: [supervised tokens, vocab], with gradient: the logits that the task's own loss computed of these
            rows and that predict a supervised token, whether or not the method asked for logits; None if there are
            none.
        batch: the rows themselves.
        token_share: the same as ``share`` for a mean over all tokens of text, supervised or not.
        whole_share: the same for a mean over all tokens, the places of pictures among them.
        counts: False, with share 0, in a process that goes along only because others need its part of the weights.
    """

    samples: list[int]
    labels: Tensor
    logits: Tensor | None
    hidden: tuple[Tensor, ...]
    share: float
    task_logits: Tensor | None = None
    batch: Batch = field(default_factory=dict)
    token_share: float = 1.0
    whole_share: float = 1.0
    counts: bool = True

    def predictions(self) -> Tensor:
        """The logits that predict the supervised tokens: [supervised tokens, vocab], row by row, with gradient."""
        from holdfast.losses.next_token import supervised_logits

        assert self.logits is not None, "the method asked for no logits"
        return supervised_logits(self.logits, self.labels)

    def computed_logits(self) -> Tensor | None:
        """The same where they were computed for whatever reason, so that a loss need not compute them again."""
        return self.predictions() if self.task_logits is None and self.logits is not None else self.task_logits

    def of_rows(self, places: Sequence[int]) -> Rehearsed:
        """Some of the rows as if they were all, in ascending order, with their predictions; ``share`` stays."""
        import torch

        from holdfast.losses.next_token import predicting

        rows = torch.tensor(places, device=self.labels.device)
        owners = predicting(self.labels).nonzero()[:, 0]
        samples = [self.samples[place] for place in places]
        logits = self.predictions()[torch.isin(owners, rows)]
        return replace(self, samples=samples, labels=self.labels[rows], logits=logits)


@dataclass
class Step:
    """One optimizer step, of one or more micro-batches.

    Attributes:
        stage: the stage that it belongs to.
        index: 0 for the first optimizer step of the stage.
        rows: task rows in this step, over all processes.
        batches: the task's rows in this process, a batch for each micro-batch, as the trainer made them. Processes take
            turns: the first micro-batch of each, then the second.
        micro_batches: micro-batches in this step, over all processes.
        logged: whether this step's values are logged; otherwise they need not be computed.
        rehearsed: the rehearsal rows of the current micro-batch after the forward pass, by method name.
        rehearsal_tokens: of the rehearsal tokens in the whole step, how many are supervised, how many are text, and how
            many there are, by method name.
        task_loss: the mean loss of the current micro-batch's task rows, a scalar without gradient; None before it.
        momentum: in :meth:`Method.after_step`, the optimizer's moving average of the gradients: a live view. It raises
            ConfigError if the optimizer has none.
    """

    stage: Stage
    index: int
    rows: int
    micro_batches: int
    logged: bool
    rehearsed: dict[str, Rehearsed] = field(default_factory=dict)
    rehearsal_tokens: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    task_loss: Tensor | None = None
    momentum: Callable[[], Shards] = field(default_factory=lambda: _no_momentum)
    batches: Sequence[Batch] = ()

    def random(self, purpose: str) -> Random:
        """A generator of random choices that depends on seed, stage, step and purpose alone."""
        return Random(f"{self.stage.seed}/{self.stage.index}/{self.index}/{purpose}")


@dataclass(frozen=True)
class Extra:
    """Rows that go with one optimizer step.

    Attributes:
        rows: tokenised rows.
        way: ``beside``: they go through the model along with the task's rows, and come back as :class:`Rehearsed`;
            ``replace``: they take the places of as many task rows; ``task``: there are none, and the task's own rows
            come back as :class:`Rehearsed`; ``instead``: one for each task row in :attr:`Step.batches`, in their order.
            These take the places of all task rows and come back as :class:`Rehearsed`, and the task's loss does not
            count.
        samples: a number for each row, by which the method finds it again; 0, 1, ... where absent.
        layers: the hidden states that the method needs, as in :meth:`Stage.hidden_states`.
        logits: whether the method needs logits: of every position (True); of those that predict a supervised token,
            to which the head is then applied alone (``supervised``); or none (False).
        per_process: whether each process gives its share of the rows; otherwise all of them give the same rows.
    """

    rows: Sequence[TokenRow]
    way: Literal["beside", "replace", "task", "instead"]
    samples: Sequence[int] | None = None
    layers: tuple[int, ...] = ()
    logits: bool | Literal["supervised"] = True
    per_process: bool = False
