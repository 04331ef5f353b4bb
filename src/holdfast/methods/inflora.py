"""InfLoRA: a new LoRA adapter a stage whose input directions are orthogonal to what earlier tasks' layers received."""

from __future__ import annotations

from typing import Any

from pydantic import Field
from torch import Tensor, nn

from holdfast.api.method import State
from holdfast.api.stage import Stage
from holdfast.config.section import Section
from holdfast.engines.vectors import weights
from holdfast.errors import ConfigError
from holdfast.methods.parts.input_space import InputSpace, input_covariances, spaces_from_state, spaces_state
from holdfast.methods.parts.stacked_lora import EXCHANGES, NOT_WITH, StackedLoRA
from holdfast.tuners.lora_factors import TRAINED, factors, plain_lora


class InfLoRA(StackedLoRA):
    """Interference-free low-rank adaptation (Liang and Li, 2024, arXiv 2404.00228).

    In stage t the rows of a layer's A_t are the r strongest right singular vectors of H_t (I - M M^T). The rows of H_t
    are the layer's inputs on the new task, and M is an orthonormal basis of what it received in earlier tasks. Only B_t
    is trained, from zero: no update changes what the layer answers to inputs in the span of M. After the stage, M grows
    until it holds a share ``threshold`` of the new task's inputs, by squared norm.
    """

    name = "inflora"
    not_with = {"o_lora": EXCHANGES, "n_lora": EXCHANGES, "gain_lora": EXCHANGES} | NOT_WITH
    causal_only = "it measures the inputs of layers that all receive the same tokens"

    class Options(Section):
        threshold: float = Field(
            0.98, gt=0, le=1, description="epsilon, the share of a task's inputs that later updates are orthogonal to"
        )
        growth: float = Field(0.0, ge=0, description="added to threshold after each stage; it stays at most 1")
        samples: int = Field(1000, ge=1, description="train rows of a task, at most, on which inputs are measured")

    options: Options

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.spaces: dict[str, InputSpace] = {}  # M, by layer; empty before the first stage's end

    @property
    def needs_rows(self) -> bool:
        return True

    def before_stage(self, stage: Stage) -> None:
        plain_lora(stage.model, self.name)
        self._check(stage)
        designed = self._designed(stage)
        super().before_stage(stage)
        weights(stage.model).load_({f"{layer}.lora_A.{TRAINED}.weight": a for layer, a in designed.items()})
        train_a(stage.model, False)

    def _check(self, stage: Stage) -> None:
        """ConfigError if the stage cannot begin."""
        if stage.index - 1 > self.stages:
            raise ConfigError(
                f"method {self.name}: stage {stage.index} begins, but the inputs of {self.stages} stages are known; go "
                "on with the same method, or give it its saved state (holdfast.training.method_state.load_states)"
            )
        if not self.stages and any(w.any() for key, w in factors(stage.model).items() if key.endswith("lora_B")):
            raise ConfigError(
                f"method {self.name}: needs a new adapter, whose B is zero, in its first stage: it exchanges A; merge "
                "what was trained before into the model's own weights (merge_and_unload)"
            )
        if self.spaces and not any(space.free_directions for space in self.spaces.values()):
            raise ConfigError(
                f"method {self.name}: the inputs of earlier tasks fill every dimension of every adapted layer, so that "
                f"stage {stage.index} could learn nothing; threshold is {self.options.threshold:g}, with growth "
                f"{self.options.growth:g}: lower ones leave more"
            )

    def _designed(self, stage: Stage) -> dict[str, Tensor]:
        """A_t of each layer, [r, in]."""
        designed = {}
        for layer, covariance in self._covariances(stage).items():
            a = factors(stage.model)[f"{layer}.lora_A"]
            space = self.spaces.get(layer, InputSpace.empty(a.shape[1]))
            rank = len(a) // max(1, self.stages)
            designed[layer] = space.strongest_free(covariance, rank).to(a)
        return designed

    def _covariances(self, stage: Stage) -> dict[str, Tensor]:
        layers = adapted(stage.model)
        return input_covariances(stage, layers, stage.sample(self.options.samples, stage.random(self.name)), self.name)

    def final_weights(self, stage: Stage) -> None:
        train_a(stage.model, True)
        super().final_weights(stage)

    def after_stage(self, stage: Stage) -> None:
        share = min(1.0, self.options.threshold + self.options.growth * (self.stages - 1))
        for layer, covariance in self._covariances(stage).items():
            self.spaces[layer] = self.spaces.get(layer, InputSpace.empty(len(covariance))).grown(covariance, share)

    def state(self) -> State:
        return super().state() | spaces_state(self.spaces)

    def load_state(self, state: State, model: nn.Module) -> None:
        super().load_state(state, model)
        now = factors(model)
        widths = {layer: now[f"{layer}.lora_A"].shape[1] for layer in adapted(model)}
        self.spaces = spaces_from_state(state, widths) if self.stages else {}


def adapted(model: nn.Module) -> dict[str, Any]:
    """The layers that the trained LoRA adapter adapts, by name."""
    return {name: layer for name, layer in model.named_modules() if TRAINED in getattr(layer, "lora_A", ())}


def train_a(model: nn.Module, trained: bool) -> None:
    """Whether the trained adapter's A is trained, beside its B."""
    for layer in adapted(model).values():
        layer.lora_A[TRAINED].weight.requires_grad_(trained)
