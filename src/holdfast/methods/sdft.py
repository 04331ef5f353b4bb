"""SDFT: the model answers by itself, and learns what it would have said if it had seen the row's answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from holdfast.api.method import Method, State
from holdfast.api.rows import IGNORED, Batch, TokenRow, last_answer, token_rows
from holdfast.api.stage import Extra, Stage, Step
from holdfast.config.section import Section
from holdfast.engines.pieces import is_divided, reshard
from holdfast.engines.process import Process
from holdfast.engines.shards import Shards
from holdfast.engines.vectors import borrowed, weights
from holdfast.errors import ConfigError
from holdfast.losses import Divergence, chunked_kl
from holdfast.losses.next_token import predicting
from holdfast.models.head import context, head, trained_head
from holdfast.models.sampling import sample
from holdfast.rehearsal.demonstration import PLACE, Demonstration, Shown
from holdfast.rehearsal.head_check import check_head
from holdfast.rehearsal.teacher import predicting_states

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

SHOWN = (
    "\n\nThis is an example for a response to the question:\n{demonstration}"
    "\n\nNow answer with a response of your own, including the thinking process."
)
"""What the paper's teacher reads after the question."""


class SDFT(Method):
    """Self-distillation fine-tuning (Shenfeld et al., 2026, arXiv 2601.19897).

    L = sum over answers y ~ p(. | x) and their tokens of KL(p(. | x, y_<t) || q(. | x, c, y_<t)), divided by the number
    of tokens, instead of the task's loss. c is the row's own answer, shown in the prompt; q is the same model with an
    exponential moving average of its weights, phi <- (1 - ema) phi + ema theta after each step. y has no gradient.
    """

    name = "sdft"
    reads_outputs = False
    causal_only = "its teacher reads prompt, demonstration and answer in one sequence"
    not_with = dict.fromkeys(
        ("eaft", "flow", "replace", "talr"), "sdft puts the model's own answers in the places of all rows of the task"
    )

    class Options(Section):
        ema: float = Field(
            0.01,
            ge=0,
            le=1,
            description="alpha, how far the teacher's weights move towards the trained ones after each step; 0: they "
            "stay those that the stage began with; 1: they are the trained ones",
        )
        shown: str = Field(
            SHOWN,
            description="what the teacher reads after the prompt (in a chat, after the user's words), with "
            "{demonstration} in the place of the row's answer",
        )
        max_new_tokens: int = Field(256, ge=1, description="tokens of the model's answer at most, within its context")
        direction: Literal["reverse", "forward"] = Field(
            "reverse", description="reverse: KL(model | teacher), as the paper has it; forward: KL(teacher | model)"
        )
        skip: int = Field(0, ge=0, description="first tokens of each answer that are not learned")

        @field_validator("shown")
        @classmethod
        def _shows_the_answer(cls, shown: str) -> str:
            if shown.count(PLACE) != 1:
                raise ValueError(f"must have {PLACE} in it, once, which the row's answer takes the place of")
            return shown

    options: Options

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.average: Shards | None = None  # phi
        self.targets: list[Tensor] = []  # of each answer of the step, the teacher's states [tokens, hidden]
        self.head: Any = None  # the teacher's, where it is trained
        self.tokens = 0  # that are learned in the step, over all processes
        self.length = 0.0  # tokens of an answer in the step, a mean

    @property
    def needs_rows(self) -> bool:
        return True

    @property
    def needs_token_batches(self) -> bool:
        return True

    @property
    def needs_rows_apart(self) -> bool:
        return True

    def try_rows(
        self,
        rows: Sequence[TokenRow],
        describe: Callable[[int], str],
        tokenizer: PreTrainedTokenizerBase,
        model_config: PretrainedConfig,
    ) -> None:
        most = getattr(model_config.get_text_config(), "max_position_embeddings", None)
        self._showing(tokenizer).check(rows, describe, most)

    def before_stage(self, stage: Stage) -> None:
        if stage.tokenizer is None:
            raise ConfigError(
                "method sdft: shows answers in prompts, so the trainer needs processing_class, the tokenizer"
            )
        self.showing, self.context = self._showing(stage.tokenizer), context(stage.model)
        self.showing.check(stage.rows, lambda number: f"task {stage.task!r}, row {number + 1}", self.context)
        check_head(stage, stage.rows[0], self.name)
        self.average = None

    def declares(self, stage: Stage) -> tuple[str, ...]:
        return (self.name,)

    def extra_rows(self, step: Step) -> Extra:
        stage, process, skip = step.stage, Process.this(), self.options.skip
        if self.average is None:  # other methods may have exchanged the weights before the first step
            self.average = weights(stage.model).copy()
        rows, asked = self._asked(step)
        # Where an engine divides the weights, processes go through the model together, each with the rows of all.
        parts = process.gather(asked) if is_divided(stage.model) else [asked]
        first = sum(map(len, parts[: process.rank])) if len(parts) > 1 else 0
        every = [one for part in parts for one in part]
        answers = self._answers(step, every)
        states = self._states(stage, every, answers)
        mine = slice(first, first + len(asked))
        self.targets = [torch.empty(0)] * len(rows)
        for one, answer, state in zip(asked, answers[mine], states[mine], strict=True):
            rows[one.place] = _row(one.shown.prompt, answer)
            self.targets[one.place] = state[skip:]
        counts = [(max(0, len(answer) - skip), len(answer), 1) for answer in answers[mine]]
        summed = process.all_reduce_sum(torch.tensor([*counts, (0, 0, 0)]).sum(0))
        self.tokens, written, number = summed.tolist()
        self.length = written / max(number, 1)
        return Extra(rows, "instead", logits="supervised")

    def loss_terms(self, step: Step, batch: Batch, outputs: Any) -> dict[str, Tensor]:
        rehearsed = step.rehearsed.get(self.name)
        if rehearsed is None:
            return {}
        now, mask = head(step.stage.model), predicting(rehearsed.labels)  # every process must ask for the head
        logits = rehearsed.predictions()[mask.cumsum(1)[mask] > self.options.skip]
        targets = [target for i in rehearsed.samples if len(target := self.targets[i])]
        if not targets:
            return {self.name: logits.sum()}  # of no token
        states = torch.cat(targets)
        divergence = Divergence(direction=self.options.direction)
        total, _ = chunked_kl(states, now, states, self.head or now, None, divergence, student_logits=logits)
        return {self.name: step.micro_batches * total / self.tokens}

    def after_step(self, step: Step, weights: Shards) -> None:
        assert self.average is not None
        for name, t in weights.tensors.items():
            self.average.tensors[name].lerp_(t.float(), self.options.ema)

    def after_stage(self, stage: Stage) -> None:
        self.average, self.targets, self.head = None, [], None

    def watched(self) -> dict[str, float]:
        return {f"{self.name}/answer_tokens": self.length}

    def state(self) -> State:
        return {} if self.average is None else self.average.state("average")

    def load_state(self, state: State, model: nn.Module) -> None:
        self.average = Shards.from_state(state, "average", like=weights(model)) if state else None

    def _showing(self, tokenizer: PreTrainedTokenizerBase) -> Demonstration:
        return Demonstration(tokenizer, self.options.shown)

    def _asked(self, step: Step) -> tuple[list[TokenRow], list[Asked]]:
        """The task's rows in this process, and of each what is asked, but for rows that only fill a batch."""
        process, size = Process.this(), step.stage.micro_batch_size
        rows, asked = list[TokenRow](), list[Asked]()
        for number, batch in enumerate(step.batches):
            first = (number * process.world + process.rank) * size
            for place, row in enumerate(token_rows(batch)):
                if last_answer(row)[1]:
                    asked.append(Asked(len(rows), first + place, self.showing.show(row)))
                rows.append(row)
        return rows, asked

    def _answers(self, step: Step, asked: Sequence[Asked]) -> list[list[int]]:
        """The answers that the model draws, which depend on seed, stage, step, the row's place in it and the model."""
        stage, most = step.stage, self.options.max_new_tokens
        room = [most if self.context is None else self.context - len(one.shown.demonstrated) for one in asked]
        return sample(
            stage.model,
            [one.shown.prompt for one in asked],
            max_new_tokens=[min(most, left) for left in room],
            seed=f"{stage.seed}/{stage.index}/{step.index}/{self.name}",
            numbers=[one.number for one in asked],
            stop_token_ids=self.showing.encoder.stop_ids,
            on_token=stage.check_stop,
        ).tokens

    def _states(self, stage: Stage, asked: Sequence[Asked], answers: Sequence[list[int]]) -> list[Tensor]:
        """The teacher's last hidden states that predict each answer's tokens, [tokens, hidden]."""
        assert self.average is not None
        rows = [_row(one.shown.demonstrated, answer) for one, answer in zip(asked, answers, strict=True)]
        states: list[Tensor] = []
        reshard(stage.model)  # after the draws; and after these passes, as the weights are exchanged
        with borrowed(stage.model) as theta:
            theta.copy_(self.average)
            for start in range(0, len(rows), stage.micro_batch_size):
                part = rows[start : start + stage.micro_batch_size]
                states += map(predicting_states, part, stage.hidden_states(part))
            self.head = trained_head(stage.model)
            reshard(stage.model)
        return states


class Asked(NamedTuple):
    """A row whose answer the model writes.

    Attributes:
        place: among the rows of this process in the step.
        number: its place in the step of all processes.
        shown: its prompts.
    """

    place: int
    number: int
    shown: Shown


def _row(prompt: list[int], answer: list[int]) -> TokenRow:
    return {"input_ids": prompt + answer, "labels": [IGNORED] * len(prompt) + answer}
