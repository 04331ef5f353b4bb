"""P-tuning: a soft prompt that a small trained network makes (PEFT's own)."""

from __future__ import annotations

from typing import Any, Literal

from peft import PromptEncoderConfig
from pydantic import ConfigDict, Field
from transformers import PreTrainedModel

from holdfast.config.section import Section
from holdfast.tuners.encoder_prompts import soft_prompts
from holdfast.tuners.peft import PeftTuner
from holdfast.tuners.soft_prompts import NOT_MERGED, PADDED


class PTuning(PeftTuner):
    """P-tuning (Liu et al., 2021, GPT Understands, Too, arXiv 2103.10385), one prompt for all stages."""

    name = "p_tuning"
    text_only = "its prompts stand before the embeddings of text, in which such a model looks for its pictures by token"
    config_class = PromptEncoderConfig
    not_merged = NOT_MERGED
    lacks = PADDED.format(name=name)

    class Options(Section):
        """P-tuning's options; any other field of peft.PromptEncoderConfig may be given by its name."""

        model_config = ConfigDict(extra="allow")

        num_virtual_tokens: int = Field(20, ge=1, description="length of the prompt")
        encoder_reparameterization_type: Literal["MLP", "LSTM"] = Field(
            "MLP", description="the network: three linear layers, or a bidirectional LSTM and two"
        )
        encoder_hidden_size: int | None = Field(
            None, ge=1, description="its width; where absent, that of the model's embeddings"
        )

    @property
    def virtual_tokens(self) -> int:
        return self.options.num_virtual_tokens

    def wrap(self, model: PreTrainedModel, config: Any) -> Any:
        return soft_prompts(model, config)
