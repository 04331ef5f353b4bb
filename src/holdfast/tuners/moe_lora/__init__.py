"""MoE-LoRA: LoRA experts and a router in every linear layer. Importing it registers the type with PEFT."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator
from transformers import PreTrainedModel

from holdfast.api.tuner import TargetOptions
from holdfast.tuners.moe_lora.config import MoeLoraConfig
from holdfast.tuners.moe_lora.layer import MoeLoraLinear
from holdfast.tuners.moe_lora.model import MoeLoraModel
from holdfast.tuners.moe_lora.routing import RouterLosses
from holdfast.tuners.peft import PeftTuner
from holdfast.tuners.peft_types import UNKNOWN, register

__all__ = ["MoeLora", "MoeLoraConfig", "MoeLoraLinear", "MoeLoraModel", "RouterLosses"]


class MoeLora(PeftTuner):
    """Mixture of LoRA experts (MOELoRA, Liu et al., 2023, arXiv 2310.18339), routed token by token in each layer.

    One adapter is trained from stage to stage. The router losses of Switch Transformers (arXiv 2101.03961) and ST-MoE
    (arXiv 2202.08906) are terms of the loss.
    """

    name = "moe_lora"
    causal_only = "its routers' losses count the tokens of the one sequence that a causal model reads"
    config_class = MoeLoraConfig
    not_merged = "its router weighs the experts anew for each token"
    lacks = UNKNOWN.format(name=name, module=__name__)

    class Options(TargetOptions):
        """The fields of :class:`MoeLoraConfig` of the same names, and the weights of :class:`RouterLosses`."""

        target: Literal["language"] = Field(
            "language", description="of a model that sees, the language model: the routers' losses count its tokens"
        )
        r: int = Field(16, ge=1, description="rank of all experts together; each has r / experts")
        experts: int = Field(4, ge=2, description="E, experts in each layer; r must be a multiple of it")
        top_k: int | None = Field(None, ge=1, description="experts that a token uses; where absent, all of them")
        lora_alpha: float = Field(32, gt=0, description="the update is scaled by lora_alpha / r")
        lora_dropout: float = Field(0.05, ge=0, lt=1, description="dropout on the experts' input")
        balance: float = Field(
            0.01, ge=0, description="weight of the load-balance loss; Switch Transformer's alpha; 0 turns it off"
        )
        router_z: float = Field(0.001, ge=0, description="weight of the router z-loss; ST-MoE's c_z; 0 turns it off")
        target_modules: str | list[str] = Field(
            "all-linear", description="names of the layers to adapt; all-linear: every linear layer but the head"
        )
        exclude_modules: str | list[str] | None = Field(None, description="names of layers that are left as they are")
        modules_to_save: list[str] | None = Field(
            None, description="names of modules that are trained in full and saved, such as layer norms"
        )

        @model_validator(mode="after")
        def _usable(self) -> MoeLora.Options:
            self.adapter()
            return self

        def adapter(self) -> MoeLoraConfig:
            """The adapter's part of the options; the rest is the companion's."""
            return MoeLoraConfig(
                task_type="CAUSAL_LM", **self.model_dump(exclude={"target", *RouterLosses.Options.model_fields})
            )

    def config(self, model: PreTrainedModel) -> MoeLoraConfig:
        return self.options.adapter()

    def companion(self) -> RouterLosses | None:
        weights = {key: getattr(self.options, key) for key in RouterLosses.Options.model_fields}
        return RouterLosses(**weights) if any(weights.values()) else None


register("moe_lora", MoeLoraConfig, MoeLoraModel)
