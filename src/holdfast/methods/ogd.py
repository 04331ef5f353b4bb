"""OGD: a step that changes no output on past tasks, to first order."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from holdfast.api.method import Method, State
from holdfast.api.stage import Stage, Step
from holdfast.config.section import Section
from holdfast.engines.saved import saved_tensor
from holdfast.engines.shards import Shards
from holdfast.engines.vectors import weights
from holdfast.methods.parts.penalty import row_gradients
from holdfast.methods.parts.projection import principal_directions
from holdfast.rehearsal.memory import Memory


class OGD(Method):
    """Orthogonal gradient descent (Farajtabar et al., 2020, arXiv 1910.07104, algorithm 1).

    g <- g - sum_d <g, b_d> b_d

    The b_d are an orthonormal basis of the gradients of outputs at the end of each past stage. A row's output is the
    sum of its answer tokens' logits (the paper's OGD-GTL). OGD+ (Bennani et al., 2020, arXiv 2006.11942) also takes the
    gradients of past tasks' rows again at the end of each stage. A full basis keeps the strongest directions of all
    gradients so far, which all count the same.
    """

    name = "ogd"
    turn = 1
    not_with: ClassVar = {
        "gem": "OGD's projection would undo the constraints that GEM has satisfied, and GEM would add back gradients "
        "that OGD takes away",
        "a_gem": "OGD's projection would undo the constraint that A-GEM has satisfied, and A-GEM would add back a "
        "gradient that OGD takes away",
        "osf": "osf writes the trained factors anew after each stage, and OGD's directions are theirs as they were",
    }

    class Options(Section):
        variant: Literal["ogd", "ogd_plus"] = Field(
            "ogd", description="ogd_plus: keep rows of past tasks and take their gradients again after every stage"
        )
        samples: int = Field(50, ge=1, description="train rows of a task whose outputs' gradients are taken")
        capacity: int = Field(
            100,
            ge=0,
            description="directions in the basis, each as large as the trained weights, and rows that ogd_plus keeps; "
            "0 turns the method off",
        )

    options: Options

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.basis: Shards | None = None  # [directions, ...]
        self.strengths = torch.zeros(0, dtype=torch.float64)  # singular values of all gradients so far
        self.memory = Memory(self.options.capacity, "quota")  # ogd_plus: rows of past tasks

    def after_backward(self, step: Step, gradients: Shards) -> dict[str, float]:
        if self.basis is None:
            return {}
        products = self.basis.products(gradients)
        size = gradients.dot(gradients) if step.logged else 0.0
        gradients.add_combined_(self.basis, -products)
        return {"ogd/removed": float(products @ products) / size} if size else {}

    @property
    def needs_rows(self) -> bool:
        return self.options.capacity > 0

    def after_stage(self, stage: Stage) -> None:
        if not self.options.capacity:
            return
        rows = stage.sample(self.options.samples, stage.random(self.name))
        gradients = Shards.stack(list(row_gradients(stage, [*self.memory.rows, *rows], true_logits)))
        lengths = torch.ones(len(rows) + len(self.memory), dtype=torch.float64)
        if self.basis is not None:
            gradients, lengths = self.basis.joined(gradients), torch.cat([self.strengths, lengths])
        self.basis, self.strengths = principal_directions(gradients, lengths, self.options.capacity)
        if self.options.variant == "ogd_plus":
            self.memory.add(stage.index, rows, stage.random(f"{self.name}/memory"))

    def state(self) -> State:
        basis = {} if self.basis is None else self.basis.state("basis")
        return basis | {"strengths": self.strengths} | self.memory.state()

    def load_state(self, state: State, model: nn.Module) -> None:
        self.strengths = saved_tensor(state, "strengths", None)
        self.basis = Shards.from_state(state, "basis", weights(model), stacked=True) if len(self.strengths) else None
        if self.basis is not None and {len(t) for t in self.basis.tensors.values()} != {len(self.strengths)}:
            raise ValueError("basis: must have a direction for each strength")
        self.memory.load_state(state, model)


def true_logits(logits: Tensor, tokens: Tensor) -> Tensor:
    """Sum of the logits [tokens, vocab] of the right tokens, int64 [tokens]."""
    return logits.gather(-1, tokens.unsqueeze(-1)).float().sum()
