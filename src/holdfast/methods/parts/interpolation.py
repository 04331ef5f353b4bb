"""Interpolation of the weights that a stage began and ended with, by a coefficient that is given or chosen."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from holdfast.api.method import Method, State
from holdfast.api.stage import Stage
from holdfast.config.section import Section
from holdfast.engines.shards import Shards
from holdfast.engines.vectors import snapshot, weights
from holdfast.errors import ConfigError
from holdfast.system.device import to_float64
from holdfast.system.shapes import of_shape

ROUNDS = 4
"""Rounds of alternating least squares for the factors of a LoRA layer; stages that begin at B = 0 need one."""

NOT_WITH = dict.fromkeys(
    ("seq_lora_merge", "o_lora", "hide_lora"),
    "it exchanges the adapter in each stage, so that there is nothing to interpolate with",
) | {
    "cia": "each decides what the final weights of a stage are",
    "osf": "the final weights would not lie in the subspace that it keeps",
}


Coefficient = Annotated[float, Field(ge=0, le=1)]
Coefficients = Coefficient | Annotated[list[Coefficient], Field(min_length=2)]


class InterpolationOptions(Section):
    """What all interpolations have in common."""

    alpha: Coefficients = Field(0.5, description="the coefficient; of a list, the task's dev split chooses")
    gain: float = Field(
        0.95,
        gt=0,
        le=1,
        description="of several values the smallest is chosen that keeps this share of the largest fall of the loss on "
        "the dev split",
    )

    @model_validator(mode="after")
    def _used(self) -> Self:
        if "gain" in self.model_fields_set and not isinstance(self.alpha, list):
            raise ValueError("gain: would change nothing, since alpha is one value; give a list to choose from")
        return self


class Interpolation(Method):
    """theta = theta_start + lambda (theta_end - theta_start), with a factor lambda for each tensor.

    theta are the model's own weights. Of a LoRA layer they are W + s B A, so its update becomes
    (1 - lambda) s B_start A_start + lambda s B_end A_end. Its factors are found by alternating least squares from the
    interpolated ones: exactly where the stage began with B = 0, otherwise nearly the best ones of the adapter's rank.
    The parameters of other adapters are interpolated themselves.

    A subclass says what lambda follows from the coefficient.
    """

    Options = InterpolationOptions
    options: InterpolationOptions
    turn = 2
    not_with = NOT_WITH

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.chosen: list[float] = []  # the coefficient of each stage so far
        self.start: Shards | None = None

    def factors(self, alpha: float, names: Sequence[str], model: nn.Module) -> dict[str, float]:
        """lambda of each trained tensor, by name."""
        raise NotImplementedError

    @property
    def candidates(self) -> list[float]:
        """The values of alpha, ascending; one if it is not chosen."""
        given = self.options.alpha
        return sorted(set(given)) if isinstance(given, list) else [given]

    @property
    def needs_dev(self) -> bool:
        return len(self.candidates) > 1

    def before_stage(self, stage: Stage) -> None:
        if self.needs_dev and not len(stage.dev):
            raise ConfigError(
                f"method {self.name}: alpha has several values, among which the task's dev split chooses, and task "
                f"{stage.task!r} has none; give the task one (a file eval, dev or validation beside train; a trainer's "
                f"eval_dataset), or one value, such as alpha: {self.candidates[-1]:g}"
            )
        self.start = snapshot(stage.model)

    def final_weights(self, stage: Stage) -> None:
        assert self.start is not None
        end, theta = snapshot(stage.model), weights(stage.model)
        names = list(theta.tensors)

        def interpolate(alpha: float) -> None:
            assert self.start is not None
            theta.copy_(interpolated(self.start, end, self.factors(alpha, names, stage.model)))

        alpha = self.candidates[0]
        if self.needs_dev:
            theta.copy_(self.start)
            before, losses = dev_loss(stage), list[float]()
            for candidate in self.candidates:
                interpolate(candidate)
                losses.append(dev_loss(stage))
            alpha = self.candidates[choose(before, losses, self.options.gain)]
        interpolate(alpha)
        self.chosen.append(alpha)
        self.start = None

    def state(self) -> State:
        return {"chosen": self.chosen}

    def load_state(self, state: State, model: nn.Module) -> None:
        self.chosen = list(of_shape(list[float], state["chosen"], "chosen"))


def dev_loss(stage: Stage) -> float:
    """The mean loss of the dev split's supervised tokens, nats per token."""
    nats, tokens = stage.losses(stage.dev)
    return sum(nats) / max(sum(tokens), 1)


def choose(before: float, losses: Sequence[float], gain: float) -> int:
    """The first of several losses that is below ``before`` by ``gain`` times as much as the lowest one is.

    Where none is below it, the lowest one.
    """
    enough = before - gain * (before - min(losses)) if min(losses) < before else min(losses)
    return next(i for i, loss in enumerate(losses) if loss <= max(enough, min(losses)))


@torch.no_grad()
def interpolated(start: Shards, end: Shards, factors: Mapping[str, float]) -> Shards:
    """The weights between two: each tensor at its factor, and of LoRA layers the update at the factor of B."""
    between = start.like(
        {name: t.float().lerp(end.tensors[name].float(), factors[name]) for name, t in start.tensors.items()}
    )
    pairs = lora_pairs(start)
    parts = [_part(vector, pairs) for vector in (start, end, between)]
    for a, b in pairs:
        if factors[b] in (0, 1):
            continue
        first, last, middle = ((to_float64(part.tensors[a]), to_float64(part.tensors[b])) for part in parts)
        for name, whole in zip((a, b), nearest_factors(first, last, middle, factors[b]), strict=True):
            t = between.tensors[name]
            t.copy_(between.piece(name, whole.to(t)))
    return between


def lora_pairs(vector: Shards) -> list[tuple[str, str]]:
    """The names of A [rank, in] and B [out, rank] of each LoRA layer."""
    pairs = []
    for name in vector.tensors:
        other = re.sub(r"\.lora_A\.([^.]+)\.weight$", r".lora_B.\1.weight", name)
        if other != name and other in vector.tensors:
            pairs.append((name, other))
    return pairs


def _part(vector: Shards, pairs: Sequence[tuple[str, str]]) -> Shards:
    """The factors of LoRA layers, in one piece."""
    names = [name for pair in pairs for name in pair]
    pieces = {name: vector.pieces[name] for name in names if name in vector.pieces}
    return Shards({name: vector.tensors[name] for name in names}, pieces).whole()


def nearest_factors(
    start: tuple[Tensor, Tensor], end: tuple[Tensor, Tensor], between: tuple[Tensor, Tensor], factor: float
) -> tuple[Tensor, Tensor]:
    """(A, B) whose product is nearest to (1 - factor) B_start A_start + factor B_end A_end, as far as it was found.

    Alternating least squares, of which each step is the least change of A or B from ``between``. The product itself,
    [out, in], is never formed.

    Args:
        start, end, between: A [rank, in] and B [out, rank], float64.
    """
    right = torch.cat([start[0], end[0]])
    left = torch.cat([(1 - factor) * start[1], factor * end[1]], dim=1)
    a, b = between
    for _ in range(ROUNDS):
        inverse = torch.linalg.pinv(a, rtol=1e-6)
        b = b + left @ (right @ inverse) - b @ (a @ inverse)
        inverse = torch.linalg.pinv(b, rtol=1e-6)
        a = a + (inverse @ left) @ right - (inverse @ b) @ a
    return a, b
