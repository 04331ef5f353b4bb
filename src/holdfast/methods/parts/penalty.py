"""Weight penalties: each weight stays near its past values, the more the more important it was to past tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from holdfast.api.method import Method, State
from holdfast.api.rows import TokenRow
from holdfast.api.stage import Stage, Step
from holdfast.config.section import Section
from holdfast.engines.shards import Shards
from holdfast.engines.vectors import gradient_of, weights
from holdfast.models.supervised import predictions
from holdfast.system.shapes import of_shape


class QuadraticPenalty(Method):
    """L = L_task + strength / 2 * sum_k <Omega_k, (theta - theta*_k)^2>, one term a past task or one for all.

    A sum of such terms is a single term and a constant, which matters only for the value in the log:

    sum_k <Omega_k, (theta - theta*_k)^2> = <Omega, (theta - theta*)^2> + spread, with Omega = sum_k Omega_k,
    theta* = sum_k Omega_k theta*_k / Omega and spread = sum_k <Omega_k, (theta*_k - theta*)^2>.

    So memory does not grow with the number of tasks. The gradient is added once an optimizer step, to the accumulated
    one. A subclass computes the importance of each weight in ``after_stage``.
    """

    class Options(Section):
        strength: float = Field(1.0, ge=0, description="weight of the penalty, which has a factor 1/2")

    options: Options
    saved: ClassVar[tuple[str, ...]] = ("importance", "anchor")
    """Names of the attributes that are vectors or None; they are saved and loaded by these names."""

    def __init__(self, **options: Any) -> None:
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
        """The value of the extra term, strength / 2 * sum_k <Omega_k, (theta - theta*_k)^2>."""
        assert self.importance is not None and self.anchor is not None
        distance = theta.copy().add_(self.anchor, -1.0)
        return 0.5 * self.options.strength * (distance.dot(product(self.importance, distance)) + self.spread)

    @torch.no_grad()
    def penalty_gradient(self, theta: Shards) -> Shards:
        """The gradient of the extra term, strength * sum_k Omega_k (theta - theta*_k), float32 or wider."""
        assert self.importance is not None and self.anchor is not None
        gradient = {}
        for name, t in theta.tensors.items():
            distance = t - self.anchor.tensors[name]
            gradient[name] = distance.mul_(self.importance.tensors[name]).mul_(self.options.strength)
        return theta.like(gradient)

    @torch.no_grad()
    def add_term(self, importance: Shards, anchor: Shards) -> None:
        """Add the term <importance, (theta - anchor)^2>; both are float32, and importance >= 0."""
        if self.importance is None or self.anchor is None:
            self.importance, self.anchor, self.spread = importance, anchor, 0.0
            return
        moved = anchor.copy().add_(self.anchor, -1.0)
        share = {}  # of the new importance in the sum; 0 where both are 0
        for name, new in importance.tensors.items():
            share[name] = new / (new + self.importance.tensors[name]).clamp_min_(torch.finfo(new.dtype).tiny)
        step = product(importance.like(share), moved)
        self.spread += moved.dot(product(self.importance, step))
        self.anchor.add_(step)
        self.importance.add_(importance)

    def set_term(self, importance: Shards, anchor: Shards) -> None:
        """Replace all terms by <importance, (theta - anchor)^2>."""
        self.importance = self.anchor = None
        self.add_term(importance, anchor)

    def state(self) -> State:
        state: State = {"spread": self.spread}
        for name in self.saved:
            vector: Shards | None = getattr(self, name)
            state |= vector.state(name) if vector is not None else {}
        return state

    def load_state(self, state: State, model: nn.Module) -> None:
        self.spread = of_shape(float, state["spread"], "spread")
        for name in self.saved:
            is_saved = any(key.startswith(f"{name}/") for key in state)
            setattr(self, name, Shards.from_state(state, name, like=weights(model)) if is_saved else None)


def product(one: Shards, other: Shards) -> Shards:
    """Elementwise product."""
    return one.like({name: t * other.tensors[name] for name, t in one.tensors.items()})


def row_gradients(
    stage: Stage, rows: Sequence[TokenRow], scalar: Callable[[Tensor, Tensor], Tensor]
) -> Iterator[Shards]:
    """The gradient of a scalar of the model's output, for each row by itself, at the current weights, without dropout.

    Args:
        scalar: a function of the logits that predict the row's supervised tokens, [tokens, vocab] in the model's data
            type, and of these tokens, int64 [tokens].

    Yields:
        float32, one tensor a trainable parameter, for each row in turn.
    """
    model = stage.model
    training = model.training
    model.eval()
    with stage.show("gradients of single rows") as show:
        for number, row in enumerate(rows, 1):
            batch = stage.collate([row])
            labels = batch.pop("labels")
            logits = predictions(model, batch, labels, use_cache=False)
            yield gradient_of(scalar(logits, labels[:, 1:][labels[:, 1:] != -100]), model)
            show(number, len(rows))
    model.train(training)
