"""Dark experience replay: past samples are stored with the logits that the model gave them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from holdfast.api.method import Method, State
from holdfast.api.rows import IGNORED, Batch, TokenRow
from holdfast.api.stage import Extra, Stage, Step
from holdfast.config.section import Section
from holdfast.engines.saved import saved_tensor
from holdfast.losses import logit_mse
from holdfast.models.head import base, whole_head
from holdfast.rehearsal.head_check import check_head
from holdfast.rehearsal.memory import Memory
from holdfast.rehearsal.teacher import predicting, predicting_states
from holdfast.system.shapes import of_shape


class DER(Method):
    """Dark experience replay (Buzzega et al., 2020, arXiv 2004.07211, equation 6).

    L = CE(task) + weight * mean over answer tokens of |z - h(x)|^2 / vocab, with z the logits that were stored with
    the sample and h(x) the model's. The paper does not divide by the number of classes; its code does, and its weights
    of 0.1 to 0.5 assume it. Samples and logits are stored at the end of their stage, in the model's data type: one
    number a token of the vocabulary for every answer token, so a large vocabulary needs a small ``capacity``.
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

    options: Options

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.memory = Memory(self.options.capacity, self.options.policy)
        self.logits: list[Tensor] = []  # of each memory row, [answer tokens, vocab], on the CPU

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
        return Extra([self.memory.rows[i] for i in samples], "beside", samples)

    def loss_terms(self, step: Step, batch: Batch, outputs: Any) -> dict[str, Tensor]:
        rehearsed = step.rehearsed.get(self.name)
        if rehearsed is None:
            return {}
        assert rehearsed.logits is not None
        student = rehearsed.logits[predicting(rehearsed.labels)]
        stored = torch.cat([self.logits[sample] for sample in rehearsed.samples]).to(student.device)
        distance = logit_mse(student, stored) / student.shape[-1]
        return {self.name: self.options.weight * rehearsed.share * distance}

    def after_stage(self, stage: Stage) -> None:
        stored = dict(zip(self._keys(), self.logits, strict=True))
        self.memory.add(stage.index, stage.rows, stage.random(self.name))
        new = [row for key, row in zip(self._keys(), self.memory.rows, strict=True) if key not in stored]
        fresh = iter(answer_logits(stage, new))
        self.logits = [stored[key] if key in stored else next(fresh) for key in self._keys()]

    def _keys(self) -> list[tuple[int, int]]:
        """The stage and the place of each row of the memory."""
        return list(zip(self.memory.tasks, self.memory.places, strict=True))

    def state(self) -> State:
        lengths = [len(logits) for logits in self.logits]
        return self.memory.state() | ({"logits": torch.cat(self.logits), "answers": lengths} if lengths else {})

    def load_state(self, state: State, model: nn.Module) -> None:
        self.memory.load_state(state, model)
        lengths = of_shape(list[int], state.get("answers", []), "answers")
        if lengths != [sum(label != IGNORED for label in row["labels"][1:]) for row in self.memory.rows]:
            raise ValueError("answers: must be the number of answer tokens of each row")
        vocabulary = getattr(base(model).get_output_embeddings(), "out_features", None)
        logits = saved_tensor(state, "logits", sum(lengths), vocabulary) if lengths else torch.zeros(0)
        self.logits = list(torch.split(logits, lengths))


@torch.no_grad()
def answer_logits(stage: Stage, rows: Sequence[TokenRow]) -> list[Tensor]:
    """The logits that predict the supervised tokens of each row, without dropout.

    Returns:
        one tensor a row, [answer tokens, vocab], in the model's data type, on the CPU.
    """
    head = whole_head(stage.model)
    states = zip(rows, stage.hidden_states(rows), strict=True)
    return [head.logits(predicting_states(row, hidden)).cpu() for row, hidden in states]
