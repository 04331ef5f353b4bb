"""HiDe-LoRA: weights for each task, and at test time those of the task that a prompt most likely belongs to."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from holdfast.api.method import Method, State
from holdfast.api.rows import TokenRow
from holdfast.api.stage import Stage
from holdfast.config.section import Section
from holdfast.engines.saved import saved_tensor
from holdfast.engines.shards import Shards
from holdfast.engines.vectors import borrowed, snapshot, weights
from holdfast.methods.parts.queries import prompt_queries
from holdfast.models.head import base
from holdfast.system.shapes import Count, of_shape

if TYPE_CHECKING:
    from holdfast.api.at_test import Evaluation


class HiDeLoRA(Method):
    """HiDe-Prompt (Wang et al., 2023, arXiv 2310.07234), its LoRA version: the task of a prompt chooses the adapter.

    p(y | x) = p(y | x, adapter t(x)),  t(x) = argmax_t max_c N(h(x); mu_t,c, S),  S = (1 - s) C + s tr(C)/d I

    h(x), of d entries, is the mean of the last hidden states over the prompt, of the model before the first stage.
    mu_t,c are task t's means of it, and C is the covariance around them, shared by all tasks. A stage trains one
    adapter, or whatever the tuner trains, and its result is stored for the stage's task.
    """

    name = "hide_lora"
    not_with: ClassVar = {
        "o_lora": "it exchanges the trained adapter in each stage, and hide_lora keeps one of one shape for each task",
        "seq_lora_merge": "each decides what becomes of a stage's adapter",
        "mbpa": "each sets the trained weights for a test row, so that one would undo the other",
    }
    lacks = (
        "chooses, for each prompt, among one adapter a task: here is the last stage's adapter alone, and earlier tasks "
        "lose theirs"
    )

    class Options(Section):
        start: Literal["previous", "fresh"] = Field(
            "previous", description="what a stage trains: the last stage's adapter, or the first one's as it began"
        )
        samples: int = Field(1000, ge=1, description="train rows of a task, at most, from which it is known again")
        centroids: int = Field(
            1, ge=1, description="means that describe a task's prompts; several are k-means clusters"
        )
        shrinkage: float = Field(
            0.1, gt=0, le=1, description="s, the share of a sphere in the covariance; 1: the nearest mean decides"
        )

    options: Options

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.start: Shards | None = None  # the trained weights before the first stage
        self.adapters: list[Shards] = []  # by task, on the CPU
        self.means: list[Tensor] = []  # by task, float64 [centroids, hidden]
        self.scatter = torch.zeros(0)  # sum of d d^T, d = h - mu, over the rows of all tasks; float64 [hidden, hidden]
        self.rows = 0  # the number of these rows

    @property
    def needs_rows(self) -> bool:
        return True

    def before_stage(self, stage: Stage) -> None:
        if self.start is None:
            self.start = snapshot(stage.model)
        elif self.options.start == "fresh":
            weights(stage.model).copy_(self.start)

    def after_stage(self, stage: Stage) -> None:
        assert self.start is not None
        self.adapters.append(snapshot(stage.model))
        chance = stage.random(self.name)
        rows = stage.sample(self.options.samples, chance)
        with borrowed(stage.model) as theta:
            theta.copy_(self.start)
            queries = prompt_queries(stage.model, rows, stage.collate, stage.micro_batch_size).double()
        means, nearest = k_means(queries, self.options.centroids, chance)
        rest = queries - means[nearest]
        self.scatter = rest.T @ rest + (self.scatter if self.means else 0)
        self.rows += len(rows)
        self.means.append(means)

    def infer(self, queries: Tensor) -> list[int]:
        """t(x) for each row of h(x), [rows, hidden]; the first task is 0."""
        covariance, s = self.scatter / self.rows, self.options.shrinkage
        hidden = len(covariance)
        sphere = torch.eye(hidden, dtype=torch.float64) * (float(covariance.trace()) / hidden or 1.0)
        whiten = torch.linalg.cholesky((1 - s) * covariance + s * sphere)

        def white(x: Tensor) -> Tensor:
            return torch.linalg.solve_triangular(whiten, x.double().T, upper=False).T

        rows = white(queries)
        distances = [torch.cdist(rows, white(means)).min(dim=1).values for means in self.means]
        return torch.stack(distances).argmin(dim=0).tolist()

    def at_test(self, evaluation: Evaluation, rows: Sequence[TokenRow]) -> Iterator[Sequence[int]]:
        if self.start is None or not self.adapters:
            yield range(len(rows))
            return
        with borrowed(evaluation.model) as theta:
            theta.copy_(self.start)
            tasks = self.infer(prompt_queries(evaluation.model, rows, evaluation.collate, evaluation.batch_size))
            for task in sorted(set(tasks)):
                theta.copy_(self.adapters[task])
                yield [place for place, inferred in enumerate(tasks) if inferred == task]

    def state(self) -> State:
        if self.start is None:
            return {}
        state: State = self.start.state("start") | {"stages": len(self.adapters), "rows": self.rows}
        for number, (adapter, means) in enumerate(zip(self.adapters, self.means, strict=True), start=1):
            state |= adapter.state(f"adapter/{number}") | {f"means/{number}": means}
        return state | ({"scatter": self.scatter} if self.adapters else {})

    def load_state(self, state: State, model: nn.Module) -> None:
        if not state:
            return
        like = snapshot(model)

        def part(prefix: str) -> Shards:
            return Shards.from_state(state, prefix, like)

        numbers = range(1, of_shape(Count, state["stages"], "stages") + 1)
        self.start = part("start")
        self.adapters = [part(f"adapter/{number}") for number in numbers]
        self.rows = of_shape(Count, state["rows"], "rows")
        if numbers:
            hidden = base(model).config.get_text_config().hidden_size
            self.means = [saved_tensor(state, f"means/{number}", None, hidden) for number in numbers]
            self.scatter = saved_tensor(state, "scatter", hidden, hidden)


def k_means(x: Tensor, count: int, chance: random.Random) -> tuple[Tensor, Tensor]:
    """Lloyd's algorithm, whose first means are rows far from one another (k-means++, Arthur and Vassilvitskii, 2007).

    Args:
        x: [rows, hidden].
        count: clusters at most; there are no more clusters than distinct rows.

    Returns:
        means [clusters, hidden], and the number of the nearest mean for each row, [rows].
    """
    first = [chance.randrange(len(x))]
    while len(first) < count and (distances := torch.cdist(x, x[first]).min(dim=1).values).any():
        first += chance.choices(range(len(x)), distances.square().tolist())
    means = x[first]
    for _ in range(100):
        nearest = torch.cdist(x, means).argmin(dim=1)
        last, means = means, means.clone()
        for k in nearest.unique():
            means[k] = x[nearest == k].mean(dim=0)
        if torch.equal(means, last):
            break
    return means, nearest
