"""MbPA++: sparse replay from an episodic memory, and at test time a few steps on the rows most like each prompt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from pydantic import Field
from torch import nn

from holdfast.api.method import Method, State
from holdfast.api.rows import TokenRow
from holdfast.api.stage import Stage, Step
from holdfast.config.section import Section
from holdfast.engines.saved import saved_tensor
from holdfast.engines.shards import Shards
from holdfast.engines.vectors import borrowed, gradient_of, snapshot
from holdfast.losses.next_token import predicting, prediction_nll
from holdfast.methods.parts.queries import prompt_queries
from holdfast.models.generation import evaluating
from holdfast.models.head import base
from holdfast.models.supervised import predictions
from holdfast.rehearsal.memory import Memory
from holdfast.system.shapes import Count, of_shape

if TYPE_CHECKING:
    from holdfast.api.at_test import Evaluation


class MbPA(Method):
    """MbPA++ (de Masson d'Autume et al., 2019, arXiv 1906.01076): sparse replay, and local adaptation at test time.

    theta_x = argmin_w  strength |w - theta|^2 + 1/K sum_k NLL(y_k | x_k; w)  (equation 1, by ``steps`` of plain
    gradient descent from theta)

    x_1 .. x_K are the memory's rows nearest to the prompt x, and NLL is the mean over an answer's tokens. x is answered
    with theta_x, which is then discarded. A row's key is the mean of the last hidden states over its prompt, of the
    model before the first stage.
    """

    name = "mbpa"
    not_with = dict.fromkeys(
        ("o_lora", "seq_lora_merge"),
        "mbpa's keys come from the trained weights as they were at first, and the other exchanges them in each stage",
    )

    class Options(Section):
        neighbours: int = Field(16, ge=1, description="K, rows of the memory that each test row is adapted to")
        steps: int = Field(10, ge=0, description="gradient steps for each test row; 0: no local adaptation")
        learning_rate: float = Field(0.05, gt=0, description="size of these steps")
        strength: float = Field(
            0.001, ge=0, description="lambda, which keeps the adapted weights near the trained ones"
        )
        replay: float = Field(
            0.01, ge=0, le=1, description="share of optimizer steps in which as many rows are replayed as are learned"
        )
        write_probability: float = Field(
            1.0, gt=0, le=1, description="with which a train row is written into the memory"
        )
        capacity: int = Field(
            10000, ge=1, description="rows that the memory holds; of more, each is kept with the same probability"
        )

    options: Options

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.memory = Memory(self.options.capacity, "reservoir")
        self.keys = torch.zeros(0, 0)  # of the memory's rows, float32 [rows, hidden]
        self.start: Shards | None = None  # the trained weights before the first stage
        self.steps = 0  # of the optimizer, over all stages

    @property
    def needs_rows(self) -> bool:
        return True

    def before_stage(self, stage: Stage) -> None:
        if self.start is None:
            self.start = snapshot(stage.model)

    def after_backward(self, step: Step, gradients: Shards) -> dict[str, float]:
        self.steps += 1
        if not (self.options.replay and len(self.memory)) or self.steps % round(1 / self.options.replay):
            return {}
        rows = self.memory.sample(step.rows, step.random(self.name))
        gradients.add_(step.stage.gradient(rows))
        return {"mbpa/replayed": float(len(rows))}

    def after_stage(self, stage: Stage) -> None:
        assert self.start is not None
        chance = stage.random(self.name)
        rows = [row for row in stage.rows if chance.random() < self.options.write_probability]
        self.memory.add(stage.index, rows, chance)
        new = [place for place, task in enumerate(self.memory.tasks) if task == stage.index]
        if not new:
            return
        with borrowed(stage.model) as theta:
            theta.copy_(self.start)
            queries = prompt_queries(
                stage.model, [self.memory.rows[i] for i in new], stage.collate, stage.micro_batch_size
            )
        keys = queries.new_zeros(len(self.memory), queries.shape[1])
        if len(self.keys):
            keys[: len(self.keys)] = self.keys  # a row that the memory keeps stays in its place
        keys[new] = queries
        self.keys = keys

    @property
    def lacks(self) -> str:
        adapts = (
            "adapts the weights to each prompt by a few gradient steps on remembered rows: here are the weights before "
            "that, without the memory"
        )
        return adapts if self.options.steps else ""

    def at_test(self, evaluation: Evaluation, rows: Sequence[TokenRow]) -> Iterator[Sequence[int]]:
        if not (self.options.steps and len(self.memory)):
            yield range(len(rows))
            return
        alike: dict[tuple[int, ...], list[int]] = {}
        for place, nearest in enumerate(self.nearest(evaluation, rows)):
            alike.setdefault(nearest, []).append(place)
        for nearest, places in alike.items():
            with borrowed(evaluation.model) as theta:
                self.adapt(evaluation, theta, [self.memory.rows[i] for i in nearest])
                yield places

    def nearest(self, evaluation: Evaluation, rows: Sequence[TokenRow]) -> list[tuple[int, ...]]:
        """For each row the places in the memory of its K nearest neighbours by Euclidean distance, in ascending order.

        Of rows at equal distance the first ones count.
        """
        assert self.start is not None
        with borrowed(evaluation.model) as theta:
            theta.copy_(self.start)
            queries = prompt_queries(evaluation.model, rows, evaluation.collate, evaluation.batch_size)
        distances = ((self.keys - query).square().sum(dim=1) for query in queries)
        return [tuple(sorted(d.argsort(stable=True)[: self.options.neighbours].tolist())) for d in distances]

    def adapt(self, evaluation: Evaluation, theta: Shards, rows: Sequence[TokenRow]) -> None:
        """Take the gradient steps on the model's trained weights ``theta``, a live view, without dropout."""
        origin, pull = theta.copy(), 2 * self.options.strength
        with evaluating(evaluation.model):
            for _ in range(self.options.steps):
                gradient = neighbours_gradient(evaluation, rows)
                gradient.add_(theta, pull).add_(origin, -pull)
                theta.add_(gradient, -self.options.learning_rate)

    def state(self) -> State:
        if self.start is None:
            return {}
        return self.memory.state() | self.start.state("start") | {"keys": self.keys, "steps": self.steps}

    def load_state(self, state: State, model: nn.Module) -> None:
        if state:
            self.memory.load_state(state, model)
            self.start = Shards.from_state(state, "start", like=snapshot(model))
            hidden = base(model).config.get_text_config().hidden_size if len(self.memory) else None
            self.keys = saved_tensor(state, "keys", len(self.memory), hidden)
            self.steps = of_shape(Count, state["steps"], "steps")


def neighbours_gradient(evaluation: Evaluation, rows: Sequence[TokenRow]) -> Shards:
    """Gradient of the mean over rows of the mean negative log-likelihood of a row's supervised tokens."""
    rows = sorted(rows, key=lambda row: len(row["input_ids"]))
    total: Shards | None = None
    for start in range(0, len(rows), evaluation.batch_size):
        batch = evaluation.collate(rows[start : start + evaluation.batch_size])
        labels = batch.pop("labels")
        nll = prediction_nll(predictions(evaluation.model, batch, labels, use_cache=False), labels)
        places = predicting(labels)
        counts = places.sum(dim=1)[places.nonzero()[:, 0]]  # of each token's row
        part = gradient_of((nll / counts).sum() / len(rows), evaluation.model)
        total = part if total is None else total.add_(part)
    assert total is not None, "no neighbours"
    return total
