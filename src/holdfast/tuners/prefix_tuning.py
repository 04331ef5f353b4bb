"""Prefix tuning: keys and values before those of every attention layer are trained (PEFT's own)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from peft import PrefixTuningConfig
from pydantic import ConfigDict, Field
from torch import Tensor, nn
from transformers import PreTrainedModel

from holdfast.config.section import Section
from holdfast.config.training import BaseTrainingConfig
from holdfast.errors import ConfigError
from holdfast.models.cache import NAMES, cache_name
from holdfast.tuners.peft import PeftTuner
from holdfast.tuners.soft_prompts import NOT_MERGED, PADDED, SoftPromptModel

if TYPE_CHECKING:
    from transformers.utils import ModelOutput

NO_CHECKPOINTING = (
    "tuner prefix: the prefix lies in the cache of keys and values, which transformers leaves out when activations are "
    "recomputed, so that nothing would be learned; turn gradient checkpointing off, or use the tuner prompt"
)


class PrefixTuning(PeftTuner):
    """Prefix tuning (Li and Liang, 2021, arXiv 2101.00190), one prefix that is trained from stage to stage."""

    name = "prefix"
    text_only = "its prefixes are keys and values before the first token, after which such a model reads no pictures"
    config_class = PrefixTuningConfig
    not_merged = NOT_MERGED
    lacks = PADDED.format(name=name)
    causal_only = "PEFT puts its prefix before the decoder alone, not before the encoder, where the paper has one too"

    class Options(Section):
        """Prefix tuning's options; any other field of peft.PrefixTuningConfig may be given by its name."""

        model_config = ConfigDict(extra="allow")

        num_virtual_tokens: int = Field(20, ge=1, description="keys and values before those of every attention layer")
        prefix_projection: bool = Field(
            False, description="make them by a trained network of two layers, as the paper does for stability"
        )
        encoder_hidden_size: int | None = Field(
            None, ge=1, description="the network's width; where absent, that of a layer's keys"
        )

    @property
    def virtual_tokens(self) -> int:
        return self.options.num_virtual_tokens

    def plan(self, training: BaseTrainingConfig, steps: int) -> None:
        """Raises ConfigError if activations would be recomputed."""
        if training.gradient_checkpointing:
            raise ConfigError(NO_CHECKPOINTING)

    def wrap(self, model: PreTrainedModel, config: Any) -> PrefixModel:
        return PrefixModel(model, config)


class PrefixModel(SoftPromptModel):
    """PEFT's prefix tuning of a causal language model, with positions that padding does not move.

    The prefix is in the cache before the first token. Positions count from ``num_virtual_tokens`` on, as in PEFT, but
    without padding, since the effect of the prefix on a token depends on them.
    """

    def _insert(self, module: Any, inputs: dict[str, Any], positions: Tensor | None) -> None:
        if self.training and any(getattr(part, "gradient_checkpointing", False) for part in module.modules()):
            raise ConfigError(NO_CHECKPOINTING)
        rows = inputs["input_ids"] if inputs.get("input_ids") is not None else inputs["inputs_embeds"]
        inputs[cache_name(module) or NAMES[0]] = self.get_prompt(batch_size=len(rows))
        if inputs.get("attention_mask") is not None:
            inputs["attention_mask"] = nn.functional.pad(inputs["attention_mask"], (self.virtual_tokens, 0), value=1)
        if positions is not None:
            inputs["position_ids"] = positions + self.virtual_tokens

    def _cut(self, module: Any, args: Any, kwargs: dict[str, Any], outputs: ModelOutput) -> ModelOutput:
        return outputs  # a prefix in the cache adds no outputs
