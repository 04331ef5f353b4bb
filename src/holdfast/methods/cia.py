"""CIA: a moving average of the trained weights is what counts, with a new balance for each tensor at each step."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from holdfast.api.method import Method, State
from holdfast.api.rows import TokenRow, prompt
from holdfast.api.stage import Stage, Step
from holdfast.config.section import Section
from holdfast.engines.shards import Shards
from holdfast.engines.vectors import borrowed, snapshot, weights
from holdfast.system.shapes import Count, of_shape

if TYPE_CHECKING:
    from holdfast.api.at_test import Evaluation

Instruction = dict[str, float]
"""How often each token (its number, as text) occurs in a prompt, on average."""


class CIA(Method):
    """Continual instruction tuning by an adaptive moving average of the weights (Qiao et al., 2025, arXiv 2410.10868).

    After each optimizer step, for each tensor, with theta* = theta at the beginning of the stage,

        theta* <- beta theta* + (1 - beta) theta_t,
        equation: beta = |theta_t - theta_t-1| / |theta_t - theta*| * (|g_t| + 1) / |g_t - g_t-1|
        published: 1 - beta = factor * (|g_t| + 1) / (|theta_t - theta*| |g_t - g_t-1|)

    g_t is the step's gradient and |.| the L1 norm; beta is a constant if the quotient is not between 0 and 1. The
    authors' code is ``published``: its quotient weighs the new weights. At the end of the stage theta* becomes the
    weights. With ``grouping``, tasks with similar instructions share weights, other tasks
    begin with the model's first ones, and a test row is answered with the weights of the most similar instruction.
    """

    name = "cia"
    turn = -3

    class Options(Section):
        variant: Literal["equation", "published"] = Field(
            "published",
            description="published: the quotient of the authors' code, which weighs the new weights; equation: that of "
            "the paper, which weighs the average",
        )
        factor: float = Field(2.0, gt=0, description="published: of the quotient; Continual-NExT has 0.01")
        strength: float = Field(1.0, ge=0, le=1, description="beta is multiplied by this; 0: theta* is theta")
        constant: float = Field(0.99, ge=0, lt=1, description="beta where the quotient is not between 0 and 1")
        grouping: float | None = Field(
            None,
            gt=0,
            le=1,
            description="tasks whose instructions have this similarity, or more, share weights; where absent, all do",
        )
        samples: int = Field(64, ge=1, description="train rows of a task whose prompts show its instruction; grouping")

        @model_validator(mode="after")
        def _used(self) -> CIA.Options:
            if self.variant == "equation" and "factor" in self.model_fields_set:
                raise ValueError("factor: would change nothing, since variant is equation, which has none")
            return self

    options: Options

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.average: Shards | None = None  # theta*
        self.gradient: Shards | None = None  # g_t-1, then g_t
        self._before: Shards | None = None  # theta_t-1, within a step
        self._pull = torch.zeros(())  # (|g_t| + 1) / |g_t - g_t-1|, [tensors]
        self.instructions: list[tuple[int, Instruction]] = []  # (group, instruction) of each task
        self.groups: dict[int, Shards] = {}  # the weights of each group after its last stage
        self.first: Shards | None = None  # the weights that a new group begins with
        self.group = 0  # of the current task

    def before_stage(self, stage: Stage) -> None:
        if self.options.grouping is not None:
            self._join_group(stage)
        self.average = self.gradient = None

    def after_backward(self, step: Step, gradients: Shards) -> dict[str, float]:
        if not self.options.strength:
            return {}
        before, gradient = weights(step.stage.model).copy(), gradients.copy()
        if self.average is None:
            self.average = before.copy()
        if self.gradient is not None:
            change = self.gradient.add_(gradient, -1.0).l1()
            self._before, self._pull = before, (gradient.l1() + 1) / change
        self.gradient = gradient
        return {}

    @torch.no_grad()
    def after_step(self, step: Step, weights: Shards) -> None:
        if self.average is None:
            return
        beta = self._balance(weights)
        for share, (name, t) in zip(beta.tolist(), weights.tensors.items(), strict=True):
            self.average.tensors[name].lerp_(t.float(), 1 - share)

    def _balance(self, theta: Shards) -> Tensor:
        """beta for each tensor, float64 [tensors]."""
        assert self.average is not None
        if self._before is None:
            beta = torch.full((len(theta.tensors),), math.nan, dtype=torch.float64)
        else:
            away = theta.copy().add_(self.average, -1.0).l1()
            if self.options.variant == "equation":
                beta = self._before.add_(theta, -1.0).l1() / away * self._pull
            else:
                beta = 1 - self.options.factor / away * self._pull
        usable = (beta > 0) & (beta < 1)  # False for a quotient by zero
        return self.options.strength * torch.where(usable, beta, self.options.constant)

    @property
    def needs_rows(self) -> bool:
        return self.options.grouping is not None

    def final_weights(self, stage: Stage) -> None:
        if self.average is not None:
            weights(stage.model).copy_(self.average)
        self.average = self.gradient = self._before = None
        if self.options.grouping is not None:
            self.groups[self.group] = snapshot(stage.model)

    def _join_group(self, stage: Stage) -> None:
        """Find the task's group, or open one, and put the group's weights into the model."""
        assert self.options.grouping is not None
        if self.first is None:
            self.first = snapshot(stage.model)
        rows = stage.sample(self.options.samples, stage.random(self.name))
        instruction = common_tokens([prompt(row) for row in rows])
        similar = nearest(instruction, [past for _, past in self.instructions])
        if similar is not None and similar[1] >= self.options.grouping:
            self.group = self.instructions[similar[0]][0]
        else:
            self.group = len(self.groups)
        self.instructions.append((self.group, instruction))
        weights(stage.model).copy_(self.groups.get(self.group, self.first))

    @property
    def lacks(self) -> str:
        groups = (
            "with grouping keeps weights for each group of alike instructions and chooses among them for each prompt: "
            "here are the last stage's group's alone"
        )
        return groups if self.options.grouping is not None else ""

    def at_test(self, evaluation: Evaluation, rows: Sequence[TokenRow]) -> Iterator[Sequence[int]]:
        chosen = [self.group_of(row) for row in rows]
        for group in sorted(set(chosen)):
            members = [i for i, of in enumerate(chosen) if of == group]
            if group == self.group:
                yield members
            else:
                with borrowed(evaluation.model) as theta:
                    theta.copy_(self.groups[group])
                    yield members

    def group_of(self, row: TokenRow) -> int:
        """The group with the instruction that a row's prompt is most similar to; the current one if none is similar."""
        similar = nearest(counted(prompt(row)), [instruction for _, instruction in self.instructions])
        return self.group if similar is None or similar[1] == 0 else self.instructions[similar[0]][0]

    def state(self) -> State:
        state: State = {} if self.average is None else self.average.state("average")
        state |= {} if self.gradient is None else self.gradient.state("gradient")
        if self.first is None:
            return state
        state |= self.first.state("first") | {"group": self.group, "instructions": self.instructions}
        for number, theta in self.groups.items():
            state |= theta.state(f"group{number}")
        return state

    def load_state(self, state: State, model: nn.Module) -> None:
        theta = weights(model)
        prefixes = {key.partition("/")[0] for key in state}
        self.average = Shards.from_state(state, "average", like=theta) if "average" in prefixes else None
        self.gradient = Shards.from_state(state, "gradient", like=theta) if "gradient" in prefixes else None
        if "first" in prefixes:
            like = snapshot(model)  # on the CPU, in the weights' own data types
            self.first = Shards.from_state(state, "first", like)
            self.group = of_shape(Count, state["group"], "group")
            pairs = of_shape(list[tuple[Count, dict[str, float]]], [tuple(pair) for pair in state["instructions"]])
            self.instructions = [*pairs]
            groups = sorted({group for group, _ in self.instructions if f"group{group}" in prefixes})
            self.groups = {group: Shards.from_state(state, f"group{group}", like) for group in groups}


def counted(tokens: Sequence[int]) -> Instruction:
    """How often each token occurs in a prompt."""
    return {str(token): float(count) for token, count in Counter(tokens).items()}


def common_tokens(prompts: Sequence[Sequence[int]]) -> Instruction:
    """The instruction of a task: the tokens that occur in all its prompts, with their mean counts."""
    counts = [counted(tokens) for tokens in prompts]
    common = set(counts[0]).intersection(*counts)
    return {token: sum(count[token] for count in counts) / len(counts) for token in sorted(common, key=int)}


def nearest(query: Mapping[str, float], instructions: Sequence[Instruction]) -> tuple[int, float] | None:
    """The instruction with the highest cosine similarity to ``query``, and this similarity, to six places.

    Both are vectors of counts times inverse document frequencies, log((1 + n) / (1 + df)) + 1, over the n instructions
    and the query (smoothed TF-IDF). None if there are no instructions.
    """
    if not instructions:
        return None
    documents = Counter(token for instruction in [query, *instructions] for token in instruction)
    weight = {token: math.log((2 + len(instructions)) / (1 + df)) + 1 for token, df in documents.items()}

    def length(instruction: Mapping[str, float]) -> float:
        return math.sqrt(sum((weight[token] * count) ** 2 for token, count in instruction.items()))

    similarity = []
    for instruction in instructions:
        product = sum(weight[t] ** 2 * count * query.get(t, 0.0) for t, count in instruction.items())
        norms = length(query) * length(instruction)
        similarity.append(round(product / norms, 6) if norms else 0.0)
    best = max(range(len(instructions)), key=lambda i: similarity[i])
    return best, similarity[best]
