"""Weight penalties: keep each weight near where past tasks left it, the more the more important it was to them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from holdfast.api.method import Method, State
from holdfast.api.rows import TokenRow
from holdfast.api.stage import Stage, Step
from holdfast.config.section import Section
from holdfast.engines.shards import Shards
from holdfast.engines.vectors import gradient_of, weights
from holdfast.models.head import base


class QuadraticPenalty(Method):
    """L = L_task + strength / 2 * sum_k <Omega_k, (theta - theta*_k)^2>, one term a past task or one for all.

    A sum of such terms is a single one, up to a constant that is there only for the value in the log:

    sum_k <Omega_k, (theta - theta*_k)^2> = <Omega, (theta - theta*)^2> + spread, with Omega = sum_k Omega_k,
    theta* = sum_k Omega_k theta*_k / Omega and spread = sum_k <Omega_k, (theta*_k - theta*)^2>,

    so what is kept does not grow with the number of tasks. The gradient is added once an optimizer step, to what all
    micro-batches accumulated. A subclass says in ``after_stage`` how important each weight was.
    """

    class Options(Section):
        strength: float = Field(1.0, ge=0, description="weight of the penalty, which has a factor 1/2")

    saved: ClassVar[tuple[str, ...]] = ("importance", "anchor")
    """Attributes that are vectors, None where there is none yet; they are saved and loaded by these names."""

    def __init__(self, **options: object) -> None:
        super().__init__(**options)
        self.importance: Shards | None = None  # Omega = sum_k Omega_k
        self.anchor: Shards | None = None  # theta* = sum_k Omega_k theta*_k / Omega
        self.spread = 0.0

    def declares(self, stage: Stage) -> tuple[str, ...]:
        return (self.name,) if self.importance is not None else ()

    def after_backward(self, step: Step, gradients: Shards) -> dict[str, float]:
        if self.importance is None:
            return {}
        theta = weights(step.stage.model)
        gradients.add_(self.penalty_gradient(theta))
        return {self.name: self.penalty(theta)} if step.logged else {}

    def penalty(self, theta: Shards) -> float:
        """strength / 2 * sum_k <Omega_k, (theta - theta*_k)^2>, the value of the extra term."""
        assert self.importance is not None and self.anchor is not None
        distance = theta.copy().add_(self.anchor, -1.0)
        return 0.5 * self.options.strength * (distance.dot(product(self.importance, distance)) + self.spread)

    @torch.no_grad()
    def penalty_gradient(self, theta: Shards) -> Shards:
        """strength * sum_k Omega_k (theta - theta*_k), float32 or wider."""
        assert self.importance is not None and self.anchor is not None
        gradient = {}
        for name, t in theta.tensors.items():
            distance = t - self.anchor.tensors[name]
            gradient[name] = distance.mul_(self.importance.tensors[name]).mul_(self.options.strength)
        return theta.like(gradient)

    def choose(self, stage: Stage, count: int) -> list[TokenRow]:
        """``count`` train rows of the stage at random, or all where there are fewer."""
        places = stage.random(self.name).sample(range(len(stage.rows)), min(count, len(stage.rows)))
        return [stage.rows[place] for place in places]

    @torch.no_grad()
    def add_term(self, importance: Shards, anchor: Shards) -> None:
        """One more term: <importance, (theta - anchor)^2>, both float32, importance >= 0."""
        if self.importance is None or self.anchor is None:
            self.importance, self.anchor, self.spread = importance, anchor, 0.0
            return
        moved = anchor.copy().add_(self.anchor, -1.0)
        share = {}  # of the new term in the sum; 0 where both are 0
        for name, new in importance.tensors.items():
            share[name] = new / (new + self.importance.tensors[name]).clamp_min_(torch.finfo(new.dtype).tiny)
        step = product(importance.like(share), moved)
        self.spread += moved.dot(product(self.importance, step))
        self.anchor.add_(step)
        self.importance.add_(importance)

    def set_term(self, importance: Shards, anchor: Shards) -> None:
        """The only term from now on: <importance, (theta - anchor)^2>."""
        self.importance = self.anchor = None
        self.add_term(importance, anchor)

    def state(self) -> State:
        state: State = {"spread": self.spread}
        for name in self.saved:
            vector: Shards | None = getattr(self, name)
            state |= vector.state(name) if vector is not None else {}
        return state

    def load_state(self, state: State, model: nn.Module) -> None:
        self.spread = state["spread"]
        for name in self.saved:
            there = any(key.startswith(f"{name}/") for key in state)
            setattr(self, name, Shards.from_state(state, name, like=weights(model)) if there else None)


def product(one: Shards, other: Shards) -> Shards:
    """Elementwise product."""
    return one.like({name: t * other.tensors[name] for name, t in one.tensors.items()})


def row_gradients(
    stage: Stage, rows: Sequence[TokenRow], scalar: Callable[[Tensor, Tensor], Tensor]
) -> Iterator[Shards]:
    """Gradient of a scalar of the model's output for each row by itself, at the current weights, without dropout.

    Args:
        scalar: takes the logits that predict the row's supervised tokens, [tokens, vocab] in the model's data type,
            and these tokens, int64 [tokens].

    Yields:
        float32, one tensor a trainable parameter, for each row in turn.
    """
    model = stage.model
    chooses = "logits_to_keep" in inspect.signature(base(model).forward).parameters
    training = model.training
    model.eval()
    for row in rows:
        batch = stage.collate([row])
        labels = batch.pop("labels")[0]
        places = (labels[1:] != -100).nonzero().squeeze(-1)  # each predicts the token after it
        first = min(places.tolist(), default=0)
        # The head is not applied to the prompt: prompts are long and vocabularies are large.
        tail = len(labels) - first
        logits = model(**batch, use_cache=False, **({"logits_to_keep": tail} if chooses else {})).logits[0, -tail:]
        yield gradient_of(scalar(logits[places - first], labels[places + 1]), model)
    model.train(training)
