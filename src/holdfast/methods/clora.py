"""CLoRA: LoRA whose update is pushed to ignore random input directions, and to leave random output directions alone."""

from __future__ import annotations

from random import Random
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from holdfast.api.method import State
from holdfast.api.stage import Stage
from holdfast.engines.shards import Shards
from holdfast.engines.vectors import weights
from holdfast.errors import ConfigError
from holdfast.methods.parts.factor_penalty import FactorPenalty
from holdfast.system.shapes import of_shape
from holdfast.tuners.lora_factors import TRAINED, Factors, factors


class CLoRA(FactorPenalty):
    """Controlled LoRA (Lu et al., 2024, arXiv 2410.16801): a subspace regularisation of the factors.

    L = L_task + strength * sum over layers of (|A P_A|_F^2 + |P_B^T B|_F^2) / 2

    The update of a layer is B A. P_A [in, k] and P_B [out, k] are random with orthonormal columns, and stay the same in
    all stages. Where the terms are zero, an input in the span of P_A is not changed by the update, and no output is
    moved along P_B: a part of the update's null space is given, and its size is left free.
    """

    name = "clora"
    tuners = ("lora",)
    tuners_reason = "its penalty is one of LoRA's factors A and B"
    not_with: ClassVar = dict.fromkeys(
        ("inflora", "gain_lora"), "it sets A by the task's inputs and keeps it, and clora would change it"
    )

    class Options(FactorPenalty.Options):
        strength: float = Field(1.0, ge=0, description="lambda, the weight of the penalty, which has a factor 1/2")
        directions: int | None = Field(
            None, ge=1, description="k, columns of P_A and P_B; absent: half of a layer's inputs and of its outputs"
        )

    options: Options

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.seed: int | None = None  # of the directions
        self.fixed: Factors = {}  # P_A and P_B, by the name of the factor that they are for

    def before_stage(self, stage: Stage) -> None:
        self.seed = stage.seed if self.seed is None else self.seed
        self.fixed, trained = {}, weights(stage.model).tensors
        for key, w in factors(stage.model).items():
            if f"{key}.{TRAINED}.weight" not in trained:
                continue
            width = w.shape[1] if key.endswith("lora_A") else len(w)
            count = self.options.directions or max(1, width // 2)
            if count > width:
                raise ConfigError(
                    f"method {self.name}: directions is {count}, but {key} has {width} dimensions: at most {width}; "
                    "leave it out for half of each layer's"
                )
            chance = Random(f"{self.seed}/{self.name}/{key}")
            self.fixed[key] = random_directions(width, count, chance, w.device).to(w)
        if not self.fixed:
            raise ConfigError(
                f"method {self.name}: needs LoRA adapters, and the model has no trained lora_A or lora_B of an adapter "
                f"{TRAINED!r}; wrap it with peft.get_peft_model(model, LoraConfig(...)), or set tuner: lora"
            )

    @torch.no_grad()
    def penalty(self, model: nn.Module, gradients: Shards) -> Tensor:
        """Add the penalty's gradient; return its value, a scalar."""
        total: Any = 0.0
        now = factors(model)
        for key, p in self.fixed.items():
            w = now[key]
            if key.endswith("lora_A"):
                part = w @ p  # [r, k]
                slope = part @ p.T
            else:
                part = p.T @ w  # [k, r]
                slope = p @ part
            total = total + part.square().sum() / 2
            gradients.add_whole_(f"{key}.{TRAINED}.weight", slope, self.options.strength)
        return self.options.strength * total

    def after_stage(self, stage: Stage) -> None:
        self.fixed = {}

    def state(self) -> State:
        return {"seed": self.seed}

    def load_state(self, state: State, model: nn.Module) -> None:
        self.seed = of_shape(int | None, state["seed"], "seed")


def random_directions(width: int, count: int, chance: Random, device: torch.device) -> Tensor:
    """Random orthonormal columns, uniformly distributed, float32 [width, count]."""
    generator = torch.Generator().manual_seed(chance.getrandbits(63))
    q, r = torch.linalg.qr(torch.randn(width, count, generator=generator).to(device))
    return q * r.diagonal().sign()
