"""Sequential LoRA merging: each stage trains an adapter, and after it all adapters so far are merged into one."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any, Literal

from pydantic import Field, model_validator
from torch import nn

from holdfast.api.method import Method, State
from holdfast.api.stage import Stage
from holdfast.config.section import Section
from holdfast.engines.saved import saved_tensor
from holdfast.errors import ConfigError
from holdfast.system.shapes import Count, Facts, alike, of_shape
from holdfast.tuners.lora_factors import (
    SHAPE,
    TRAINED,
    Factors,
    exchange_adapters,
    factors,
    of_rank,
    padded,
    plain_lora,
    scalings,
    seeded,
)


class SeqLoRAMerge(Method):
    """Merge the adapters of all stages so far: task arithmetic (Ilharco et al., 2022, arXiv 2212.04089), TIES, DARE.

    With D_i = scaling * B_i A_i, a layer's update that stage i learned, the layer's update after stage t is

    linear: sum_i w_i D_i (task arithmetic).  ties (Yadav et al., 2023, arXiv 2306.01708): each D_i keeps the largest
    ``density`` of its entries; the sign of an entry is that of their sum; the entry is the mean of w_i D_i over the
    i that keep it with this sign.  dare_linear, dare_ties (Yu et al., 2023, arXiv 2311.03099): each D_i keeps a random
    ``density`` of its entries instead, divided by ``density``.  After stage 1 there is nothing to merge.
    """

    name = "seq_lora_merge"
    turn = 2
    tuners = ("lora",)
    tuners_reason = "it merges the updates B A of LoRA adapters into one of another rank"
    not_with = dict.fromkeys(
        ("ewc", "si", "mas", "ogd", "cia", "tree_lora"),
        "it remembers something of every trained weight, and seq_lora_merge exchanges them in each stage",
    ) | {
        "lwf": "its teacher is the trained adapter as it was, and seq_lora_merge exchanges it before a stage",
        "o_lora": "each decides what becomes of a stage's adapter",
    }

    class Options(Section):
        merge: Literal["linear", "ties", "dare_linear", "dare_ties"] = Field(
            "linear", description="how the stages' updates become one; linear: a weighted sum, task arithmetic"
        )
        start: Literal["fresh", "last"] = Field(
            "fresh", description="what a stage trains: the first stage's initial adapter, or the last stage's own one"
        )
        weights: float | list[float] | None = Field(
            None, description="w, one for all or one a stage; absent: 1/t for linear and dare_linear, 1 otherwise"
        )
        density: float = Field(0.2, gt=0, le=1, description="share of entries that ties and dare keep")
        rank: int | None = Field(
            None, ge=1, description="of the merged adapter, cut off by SVD; absent: all stages' ranks together"
        )

        @model_validator(mode="after")
        def _sensible(self) -> SeqLoRAMerge.Options:
            if self.merge == "linear" and "density" in self.model_fields_set:
                raise ValueError("density: would change nothing, since merge is linear, which keeps every entry")
            return self

    options: Options

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.shape: dict[str, Any] = {}  # the configuration of a stage's adapter, by the keys of SHAPE
        self.start: Factors = {}  # the adapter before the first stage
        self.learned: list[Factors] = []  # each stage's adapter after training

    def plan(self, stages: int) -> None:
        weights = self.options.weights
        if isinstance(weights, list) and len(weights) < stages:
            raise ConfigError(
                f"method {self.name}: weights has {len(weights)} entries, but there are {stages} stages; give one a "
                "stage, or one number for all; more entries than stages leave room for a run to grow"
            )

    def before_stage(self, stage: Stage) -> None:
        config = plain_lora(stage.model, self.name)
        stages = len(self.learned) + 1
        self.plan(stages)
        if stage.index > stages:
            raise ConfigError(
                f"method {self.name}: stage {stage.index} begins, but the adapters of {len(self.learned)} stages are "
                "known; go on with the same method, or give it its saved state "
                "(holdfast.training.method_state.load_states)"
            )
        if not self.learned:
            self.shape = {key: getattr(config, key) for key in SHAPE}
            self.start = copied(factors(stage.model))
            return
        begin = self.start if self.options.start == "fresh" else self.learned[-1]
        exchange_adapters(stage.model, {TRAINED: (replace(config, **self.shape), begin)})

    def final_weights(self, stage: Stage) -> None:
        self.learned.append(copied(factors(stage.model)))
        if len(self.learned) > 1:
            self.merge(stage)

    def merge(self, stage: Stage) -> None:
        """Replace the stage's adapter by the merged one."""
        model: Any = stage.model
        options, count = self.options, len(self.learned)
        config = model.peft_config[TRAINED]
        width = max([config.r, *config.rank_pattern.values()])
        rank = options.rank or width * count
        exact = options.merge == "linear" and not options.rank
        kind = "cat" if exact else "svd" if options.merge == "linear" else f"{options.merge}_svd"
        scaling = scalings(model)
        adapters = {}
        for i, learned in enumerate(self.learned, start=1):
            scaled = {key: scaling.get(key, 1.0) * w for key, w in learned.items()}
            adapters[f"stage_{i}"] = of_rank(config, width), padded(scaled, width)
        exchange_adapters(model, adapters)
        with seeded(stage.random(self.name)), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The density 1")
            model.base_model.add_weighted_adapter(
                list(adapters),
                self.weights(),
                "merged",
                combination_type=kind,
                svd_rank=rank,
                svd_full_matrices=False,
                density=options.density,
            )
        merged = padded(factors(model, "merged"), rank)
        exchange_adapters(model, {TRAINED: (of_rank(config, rank), merged)})

    def weights(self) -> list[float]:
        """The weight w of each stage so far."""
        given, count = self.options.weights, len(self.learned)
        if isinstance(given, list):
            return given[:count]
        if given is None:
            given = 1.0 if self.options.merge.endswith("ties") else 1 / count
        return [given] * count

    def state(self) -> State:
        tensors = {f"start/{key}": w for key, w in self.start.items()}
        for i, learned in enumerate(self.learned, start=1):
            tensors |= {f"{i}/{key}": w for key, w in learned.items()}
        return tensors | {"shape": self.shape, "stages": len(self.learned)}

    def load_state(self, state: State, model: nn.Module) -> None:
        now, config = factors(model), plain_lora(model, self.name)

        def part(name: str) -> Factors:
            """The adapter, of any rank, whose factors fit the model's layers."""
            found = {}
            for key, w in now.items():
                shape = (None, w.shape[1]) if key.endswith("lora_A") else (len(w), None)
                found[key] = saved_tensor(state, f"{name}/{key}", *shape)
            return found

        stages, shape = of_shape(Count, state["stages"], "stages"), of_shape(Facts, state["shape"], "shape")
        if shape and not (shape.keys() == set(SHAPE) and all(alike(shape[key], getattr(config, key)) for key in shape)):
            raise ValueError(f"shape: must have {', '.join(SHAPE)}, as a LoRA adapter's configuration has them")
        self.shape, self.start = shape, part("start") if shape else {}
        self.learned = [part(str(i)) for i in range(1, stages + 1)]


def copied(values: Factors) -> Factors:
    """Copies on the CPU."""
    return {key: w.to("cpu", copy=True) for key, w in values.items()}
