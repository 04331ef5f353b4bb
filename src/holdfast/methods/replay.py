"""Experience replay: train on stored samples of past tasks along with the new one."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field
from torch import Tensor, nn

from holdfast.config import Section
from holdfast.data.memory import Memory
from holdfast.losses.next_token import next_token_nll
from holdfast.methods.base import Batch, Extra, Method, Stage, State, Step


class Replay(Method):
    """Experience replay (Chaudhry et al., 2019, arXiv 1902.10486).

    ``beside``: L = mean CE over the task's tokens + weight * mean CE over the replayed tokens.
    ``replace``: replayed rows take the places of task rows and the loss is the mean CE over all tokens, so a step
    costs what it costs without replay.
    """

    name = "replay"

    class Options(Section):
        capacity: int = Field(1000, ge=1, description="rows that the memory holds, over all past tasks")
        policy: Literal["quota", "reservoir"] = Field(
            "quota", description="quota: as many rows of each past task; reservoir: each past row equally likely"
        )
        way: Literal["beside", "replace"] = Field(
            "beside", description="replayed rows come beside the batch or replace a share of it"
        )
        ratio: float = Field(0.25, gt=0, description="replayed rows per task row (beside), or share of rows (replace)")
        weight: float = Field(1.0, gt=0, description="weight of the replay term (beside)")

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.memory = Memory(self.options.capacity, self.options.policy)

    def declares(self, stage: Stage) -> tuple[str, ...]:
        return (self.name,) if len(self.memory) and self.options.way == "beside" else ()

    def extra_rows(self, step: Step) -> Extra | None:
        if not len(self.memory):
            return None
        count = max(1, round(self.options.ratio * step.rows))
        return Extra(self.memory.sample(count, step.random(self.name)), self.options.way)

    def loss_terms(self, step: Step, batch: Batch, outputs: Any) -> dict[str, Tensor]:
        if self.name not in step.extra:
            return {}
        extra = dict(step.extra[self.name])
        labels = extra.pop("labels")
        nll, _ = next_token_nll(step.stage.model(**extra).logits, labels)
        # A share of the mean over the whole step: exact however the rows fall into micro-batches.
        share = step.micro_batches / step.extra_tokens[self.name]
        return {self.name: self.options.weight * share * nll}

    def after_stage(self, stage: Stage) -> None:
        self.memory.add(stage.index, stage.rows, stage.random(self.name))

    def state(self) -> State:
        return self.memory.state()

    def load_state(self, state: State, model: nn.Module) -> None:
        self.memory.load_state(state)
