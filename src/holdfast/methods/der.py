"""Dark experience replay: past samples are stored with the logits that the model gave them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from holdfast.api.method import Method, State
from holdfast.api.rows import Batch, TokenRow, count_supervised
from holdfast.api.stage import Extra, Stage, Step
from holdfast.config.section import Section
from holdfast.engines.saved import saved_tensor
from holdfast.losses import logit_mse
from holdfast.losses.common import wide
from holdfast.models.head import base, whole_head
from holdfast.rehearsal.head_check import check_head
from holdfast.rehearsal.memory import Memory
from holdfast.rehearsal.teacher import predicting_states
from holdfast.system.shapes import of_shape


class DER(Method):
    """Dark experience replay (Buzzega et al., 2020, arXiv 2004.07211, equation 6).

    L = CE(task) + weight * mean over answer tokens of |z - h(x)|^2 / C, with z the logits of C classes that were stored
    with the sample and h(x) the model's. The classes are the ``top`` tokens with the strongest stored logits and one
    for all other tokens, whose logit is log sum exp of theirs: so the strength does not depend on the vocabulary. The
    paper does not divide by the number of classes; its code does, and its weights of 0.1 to 0.5 are for 10 to 200
    classes. Samples and logits are stored at the end of their stage.
    """

    name = "der"
    reads_outputs = False

    class Options(Section):
        capacity: int = Field(1000, ge=1, description="past samples that the memory holds, over all tasks")
        policy: Literal["quota", "reservoir"] = Field(
            "reservoir",
            description="reservoir: each past row equally likely (as published); quota: as many of each task",
        )
        ratio: float = Field(0.25, gt=0, le=100, description="replayed rows per task row")
        weight: float = Field(0.5, ge=0, description="alpha, the weight of the term")
        top: int | None = Field(
            10,
            ge=1,
            description="tokens whose logits are stored, the strongest, beside one for all others together; null: all "
            "tokens of the vocabulary, each a class",
        )

    options: Options

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.memory = Memory(self.options.capacity, self.options.policy)
        self.answers: list[Answer] = []  # of each memory row, on the CPU

    @property
    def needs_rows(self) -> bool:
        return True

    def before_stage(self, stage: Stage) -> None:
        if self.options.weight:
            check_head(stage, stage.rows[0], self.name)

    def declares(self, stage: Stage) -> tuple[str, ...]:
        return (self.name,) if len(self.memory) and self.options.weight else ()

    def extra_rows(self, step: Step) -> Extra | None:
        if not len(self.memory) or not self.options.weight:
            return None
        count = max(1, round(self.options.ratio * step.rows))
        samples = step.random(self.name).choices(range(len(self.memory)), k=count)
        return Extra([self.memory.rows[i] for i in samples], "beside", samples, logits="supervised")

    def loss_terms(self, step: Step, batch: Batch, outputs: Any) -> dict[str, Tensor]:
        rehearsed = step.rehearsed.get(self.name)
        if rehearsed is None:
            return {}
        student = rehearsed.predictions()
        logits, tokens = (
            torch.cat(parts).to(student.device)
            for parts in zip(*(self.answers[sample] for sample in rehearsed.samples), strict=True)
        )
        distance = logit_mse(class_logits(student, tokens), logits) / logits.shape[-1]
        return {self.name: self.options.weight * rehearsed.share * distance}

    def after_stage(self, stage: Stage) -> None:
        stored = dict(zip(self._keys(), self.answers, strict=True))
        self.memory.add(stage.index, stage.rows, stage.random(self.name))
        new = [row for key, row in zip(self._keys(), self.memory.rows, strict=True) if key not in stored]
        fresh = answers(stage, new, self.options.top)
        self.answers = [stored[key] if key in stored else next(fresh) for key in self._keys()]

    def _keys(self) -> list[tuple[int, int]]:
        """The stage and the place of each row of the memory."""
        return list(zip(self.memory.tasks, self.memory.places, strict=True))

    def state(self) -> State:
        if not self.answers:
            return self.memory.state()
        logits, tokens = (torch.cat(parts) for parts in zip(*self.answers, strict=True))
        lengths = [len(answer.logits) for answer in self.answers]
        return self.memory.state() | {"logits": logits, "tokens": tokens, "answers": lengths}

    def load_state(self, state: State, model: nn.Module) -> None:
        self.memory.load_state(state, model)
        lengths = of_shape(list[int], state.get("answers", []), "answers")
        if lengths != [count_supervised(row) for row in self.memory.rows]:
            raise ValueError("answers: must be the number of answer tokens of each row")
        self.answers = []
        if not lengths:
            return
        vocabulary = getattr(base(model).get_output_embeddings(), "out_features", None)
        if "tokens" not in state:  # version 0.1.0 stored the logits of all tokens
            every = saved_tensor(state, "logits", sum(lengths), vocabulary)
            self.answers = [Answer.of(part, self.options.top) for part in torch.split(every, lengths)]
            return
        tokens = saved_tensor(state, "tokens", sum(lengths), None, kind="counts")
        count = tokens.shape[1]
        if count != stored_tokens(vocabulary, self.options.top):
            raise ValueError(f"tokens: {count or 'all'} a place were stored, and top is {self.options.top}")
        if count and vocabulary is not None and int(tokens.max()) >= vocabulary:
            raise ValueError(f"tokens: the model has {vocabulary} tokens, and {int(tokens.max())} is none of them")
        logits = saved_tensor(state, "logits", sum(lengths), count + 1 if count else vocabulary)
        parts = (torch.split(whole, lengths) for whole in (logits, tokens))
        self.answers = [Answer(*pair) for pair in zip(*parts, strict=True)]


class Answer(NamedTuple):
    """What the model answered at the supervised places of a row.

    Attributes:
        logits: [places, classes]: of the tokens and of all others together, float32; or of the whole vocabulary, in the
            model's type.
        tokens: int32 [places, top]; [places, 0] where each token of the vocabulary is a class.
    """

    logits: Tensor
    tokens: Tensor

    @classmethod
    def of(cls, logits: Tensor, top: int | None) -> Answer:
        """Of logits [places, vocab]."""
        count = stored_tokens(logits.shape[-1], top)
        tokens = logits.topk(count, dim=-1).indices.int() if count else logits.new_empty(len(logits), 0).int()
        return cls(class_logits(logits, tokens), tokens)


def stored_tokens(vocabulary: int | None, top: int | None) -> int:
    """How many tokens have a class of their own beside all others; 0 where all have, and no other is left."""
    return 0 if top is None or (vocabulary is not None and vocabulary <= top) else top


def class_logits(logits: Tensor, tokens: Tensor) -> Tensor:
    """Logits of classes: of each of the tokens, and in the last place of all others together.

    The softmax of these is that of the vocabulary, with the other tokens' probabilities added up.

    Args:
        logits: [places, vocab].
        tokens: int [places, top]; [places, 0]: all are classes, and the logits are returned as they are.

    Returns:
        [places, top + 1], float32 or wider.
    """
    if not tokens.shape[-1]:
        return logits
    logits, tokens = wide(logits), tokens.long()
    others = logits.scatter(-1, tokens, -math.inf).logsumexp(-1, keepdim=True)
    return torch.cat([logits.gather(-1, tokens), others], dim=-1)


@torch.no_grad()
def answers(stage: Stage, rows: Sequence[TokenRow], top: int | None) -> Iterator[Answer]:
    """What the model answers at the supervised places of each row, without dropout, on the CPU."""
    head = whole_head(stage.model)
    for row, hidden in zip(rows, stage.hidden_states(rows), strict=True):
        logits = head.logits(predicting_states(row, hidden))
        if not stored_tokens(logits.shape[-1], top):
            logits = logits.to(hidden.dtype)  # the head computed them in it
        yield Answer(*(part.cpu() for part in Answer.of(logits, top)))
