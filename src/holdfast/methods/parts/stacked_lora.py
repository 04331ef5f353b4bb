"""A new LoRA adapter a stage, beside those of all earlier stages, which stay active and unchanged."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from holdfast.api.method import Method, State
from holdfast.api.stage import Stage
from holdfast.errors import ConfigError
from holdfast.system.shapes import Count, of_shape
from holdfast.tuners.lora_factors import TRAINED, exchange_adapters, factors, plain_lora, seeded, times_rank

PAST = "past"
"""The frozen adapter that holds the factors of all earlier stages side by side during a stage."""

EXCHANGES = "each decides what becomes of a stage's adapter"

NOT_WITH = dict.fromkeys(
    ("ewc", "si", "mas", "ogd", "cia", "tree_lora", "mbpa", "hide_lora"),
    "it remembers something of the trained weights, and the other trains new ones in each stage",
) | {
    "lwf": "its teacher is the trained adapter as it was, and the other exchanges it before a stage",
    "seq_lora_merge": EXCHANGES,
    "wise_ft": EXCHANGES,
    "lines": EXCHANGES,
}
"""The methods that none with a new adapter a stage can be combined with."""


class StackedLoRA(Method):
    """W x + s (sum_{i<t} B_i A_i + B_t A_t) x in stage t, of which B_t and A_t are trained.

    After a stage the model has one adapter with the factors of all stages side by side: its rank grows by r a stage. A
    subclass says what is special about the new factors.
    """

    tuners = ("lora",)
    tuners_reason = "it lays the LoRA factors of all stages side by side, in one adapter whose rank grows"
    not_with = NOT_WITH

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.stages = 0  # the number of stages whose factors the model's adapter holds

    def before_stage(self, stage: Stage) -> None:
        config = plain_lora(stage.model, self.name)
        self.stages = max(self.stages, stage.index - 1)
        if self.stages:
            if config.r % self.stages:
                raise ConfigError(
                    f"method {self.name}: stage {self.stages + 1} begins with an adapter of rank {config.r}, which is "
                    f"not {self.stages} times a stage's rank; is the trainer's stage_index right?"
                )
            past = replace(config, lora_dropout=0.0), factors(stage.model)
            with seeded(stage.random(self.name)):
                exchange_adapters(stage.model, {TRAINED: (times_rank(config, 1, self.stages), None), PAST: past})

    def final_weights(self, stage: Stage) -> None:
        if self.stages:
            model: Any = stage.model
            past, new = factors(model, PAST), factors(model)
            joined = {key: torch.cat([past[key], w], dim=0 if key.endswith("lora_A") else 1) for key, w in new.items()}
            config = times_rank(model.peft_config[TRAINED], self.stages + 1)
            exchange_adapters(model, {TRAINED: (config, joined)})
        self.stages += 1

    def state(self) -> State:
        return {"stages": self.stages}

    def load_state(self, state: State, model: nn.Module) -> None:
        self.stages = of_shape(Count, state["stages"], "stages")
