"""TreeLoRA: the gradient is pulled towards that of the most similar past task, which a bandit finds in a tree."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from holdfast.api.method import Method, State
from holdfast.api.stage import Stage, Step
from holdfast.config.section import Section
from holdfast.engines.saved import saved_tensor
from holdfast.engines.shards import Shards
from holdfast.engines.vectors import weights
from holdfast.errors import ConfigError
from holdfast.methods.parts.gradient_tree import (
    Group,
    LoraLayers,
    TreeSearch,
    build_tree,
    direction,
    distance,
    pull_cosine,
    pull_l1,
)
from holdfast.system.shapes import Count, alike, of_shape


class TreeLoRA(Method):
    """TreeLoRA (Qian et al., 2025, arXiv 2506.10355): gradients stay near that of the most similar past task.

    g <- g - strength s_l d|m_l - m_k,l|_1 / d m_l  for each layer l (equation 3)

    g is the step's gradient over the LoRA weights A and B, m its mean over the stage so far, s_l the mean absolute
    entry of m_l, and m_k the mean gradient of past task k at the scale of m. k is chosen at every step by descending a
    tree over the past tasks, one level a layer, to the child with the lowest confidence bound (equation 2).
    """

    name = "tree_lora"
    turn = -1
    tuners = ("lora", "adalora", "moe_lora")
    tuners_reason = "it compares tasks by their gradients of LoRA's factors"

    class Options(Section):
        strength: float = Field(
            0.5, ge=0, description="lambda, the most that an entry is changed, in mean entries of its layer's gradient"
        )
        distance: Literal["l1", "cosine"] = Field(
            "l1", description="how gradients are compared: l1: by the L1 gap of their directions; cosine: by the angle"
        )
        exploration: float = Field(
            2.0, ge=0, description="factor of the confidence width sqrt(log t / n); residuals lie in [0, 1]"
        )

    options: Options

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.norm = {"l1": 1, "cosine": 2}[self.options.distance]
        self.past: list[Tensor] = []  # direction of each past task's gradient, [layers, width]
        self.tree: Group | None = None
        self.search: TreeSearch | None = None
        self.steps = 0  # of the stage so far

    def before_stage(self, stage: Stage) -> None:
        trained = weights(stage.model).whole()
        if not any("lora_" in name for name in trained.tensors):
            raise ConfigError(
                "method tree_lora: needs LoRA adapters, and the model has no trainable lora_A and lora_B; wrap it with "
                "peft.get_peft_model(model, LoraConfig(...)), or set tuner: lora"
            )
        self.layers = LoraLayers(trained)
        self.mean = torch.zeros_like(self.layers.matrix(trained))
        self.steps = 0
        self.search = TreeSearch(self.tree, self.options.exploration) if self.tree else None

    def declares(self, stage: Stage) -> tuple[str, ...]:
        return (self.name,) if self.past and self.options.strength else ()

    def after_backward(self, step: Step, gradients: Shards) -> dict[str, float]:
        self.steps += 1
        whole = gradients.whole()
        self.mean.lerp_(self.layers.matrix(whole), 1 / self.steps)
        if self.search is None or not self.options.strength:
            return {}
        task = self.search.choose()
        current, past = direction(self.mean, self.norm), self.past[task]
        residuals = distance(current, past, self.norm).tolist()  # the only wait for the device
        self.search.observe(task, residuals)
        if self.options.distance == "l1":
            pull = pull_l1(current, past, self.options.strength / self.layers.widths)
        else:
            pull = pull_cosine(current, past, self.options.strength)
        scale = torch.linalg.vector_norm(self.mean, ord=self.norm, dim=-1, keepdim=True)
        self.layers.add_(whole, pull.mul_(scale))
        if gradients.pieces:
            gradients.load_(whole.tensors)
        return {self.name: self.options.strength * sum(residuals) / len(residuals)}

    def after_stage(self, stage: Stage) -> None:
        self.past.append(direction(self.mean, self.norm))
        self.tree = build_tree(self.past, self.norm)
        self.steps, self.search = 0, None

    def state(self) -> State:
        state: State = {f"past/{task}": past for task, past in enumerate(self.past)}
        state |= {"tasks": len(self.past), "tree": asdict(self.tree) if self.tree else None, "steps": self.steps}
        if self.steps:
            state["mean"] = self.mean
        if self.search:
            state |= {"rounds": self.search.rounds, "residuals": self.search.residuals}
        return state

    def load_state(self, state: State, model: nn.Module) -> None:
        device = next(iter(weights(model))).device
        shape = LoraLayers(weights(model).whole()).shape
        self.past = [
            saved_tensor(state, f"past/{task}", *shape).to(device)
            for task in range(of_shape(Count, state["tasks"], "tasks"))
        ]
        self.tree = Group.from_plain(state["tree"]) if state["tree"] else None
        if self.tree is not None:
            self.tree.check(range(len(self.past)), shape[0])
        self.steps = of_shape(Count, state["steps"], "steps")
        if self.steps:
            self.mean = saved_tensor(state, "mean", *shape).to(device)
        if self.tree and "rounds" in state:
            self.search = TreeSearch(self.tree, self.options.exploration)
            rounds, residuals = self.search.rounds, self.search.residuals
            if not alike(state["rounds"], rounds) or not alike(state["residuals"], residuals):
                raise ValueError("rounds and residuals: must be numbers, of each past task")
            self.search.rounds, self.search.residuals = state["rounds"], state["residuals"]
