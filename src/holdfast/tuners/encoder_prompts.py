"""Soft prompts of a sequence-to-sequence model, before what its encoder reads."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModelForSeq2SeqLM
from peft.config import PromptLearningConfig
from torch import nn
from transformers import PreTrainedModel

from holdfast.models.kinds import is_seq2seq
from holdfast.tuners.soft_prompts import SavedPrompts, SoftPromptModel


def soft_prompts(model: PreTrainedModel, config: PromptLearningConfig) -> SoftPromptModel | EncoderPromptModel:
    """A model with soft prompts: before the sequence, or before what a sequence-to-sequence model's encoder reads."""
    return EncoderPromptModel(model, config) if is_seq2seq(model.config) else SoftPromptModel(model, config)


class EncoderPromptModel(SavedPrompts, PeftModelForSeq2SeqLM):
    """A sequence-to-sequence model with PEFT's prompt tuning or P-tuning: a prompt before what its encoder reads.

    Plain PEFT loads the saved prompts, and does the same.
    """

    def __init__(
        self, model: PreTrainedModel, config: PromptLearningConfig, adapter_name: str = "default", **kwargs: Any
    ):
        config.num_transformer_submodules = 1  # PEFT's default has a second prompt, which it uses nowhere
        super().__init__(model, config, adapter_name, **kwargs)

    @property
    def virtual_tokens(self) -> int:
        """The number of prompt embeddings before every row."""
        return self.active_peft_config.num_virtual_tokens

    def forward(self, input_ids: Any = None, attention_mask: Any = None, **kwargs: Any) -> Any:
        return self.base_model(**self._prompted(input_ids, attention_mask), **kwargs)

    def generate(self, *, input_ids: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
        return self.base_model.generate(**self._prompted(input_ids, attention_mask), **kwargs)

    def _prompted(self, input_ids: Any, attention_mask: Any) -> dict[str, Any]:
        """The encoder's inputs with the prompt before them; as they are where there are none."""
        if input_ids is None:
            return {"attention_mask": attention_mask}
        embeds = self.get_base_model().get_input_embeddings()(input_ids)
        prompts = self.get_prompt(batch_size=len(input_ids)).to(embeds.dtype)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        return {
            "inputs_embeds": torch.cat([prompts, embeds], dim=1),
            "attention_mask": nn.functional.pad(mask, (self.virtual_tokens, 0), value=1),
        }
