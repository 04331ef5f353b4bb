"""Prompt tuning: only embeddings before the input are trained (PEFT's own)."""

from __future__ import annotations

from typing import Any, Literal

from peft import PromptTuningConfig
from pydantic import ConfigDict, Field, model_validator
from transformers import PreTrainedModel

from holdfast.config.section import Section
from holdfast.models.seq2seq import task_type
from holdfast.tuners.encoder_prompts import soft_prompts
from holdfast.tuners.peft import PeftTuner
from holdfast.tuners.soft_prompts import NOT_MERGED, PADDED


class PromptTuning(PeftTuner):
    """Prompt tuning (Lester et al., 2021, arXiv 2104.08691), one soft prompt that is trained from stage to stage."""

    name = "prompt"
    text_only = "its prompts stand before the embeddings of text, in which such a model looks for its pictures by token"
    config_class = PromptTuningConfig
    not_merged = NOT_MERGED
    lacks = PADDED.format(name=name)

    class Options(Section):
        """Prompt tuning's options; any other field of peft.PromptTuningConfig may be given by its name.

        A prompt needs a much higher learning rate than a model's weights: the paper's is 0.3.
        """

        model_config = ConfigDict(extra="allow")

        num_virtual_tokens: int = Field(
            20, ge=1, description="length of the prompt; the paper finds little to gain beyond 20"
        )
        prompt_tuning_init: Literal["SAMPLE_VOCAB", "RANDOM", "TEXT"] = Field(
            "SAMPLE_VOCAB",
            description="SAMPLE_VOCAB: embeddings of random tokens; RANDOM: standard normal; TEXT: those of "
            "prompt_tuning_init_text, repeated or cut",
        )
        prompt_tuning_init_text: str | None = Field(None, description="what prompt_tuning_init TEXT begins with")

        @model_validator(mode="after")
        def _text(self) -> PromptTuning.Options:
            if (self.prompt_tuning_init == "TEXT") != (self.prompt_tuning_init_text is not None):
                raise ValueError("prompt_tuning_init_text: goes with prompt_tuning_init TEXT, and only with it")
            return self

    @property
    def virtual_tokens(self) -> int:
        return self.options.num_virtual_tokens

    def config(self, model: PreTrainedModel) -> PromptTuningConfig:
        options: dict[str, Any] = self.options.model_dump()
        if options["prompt_tuning_init"] == "TEXT":
            options = {"tokenizer_name_or_path": model.name_or_path} | options
        return PromptTuningConfig(task_type=task_type(model), **options)

    def wrap(self, model: PreTrainedModel, config: Any) -> Any:
        return soft_prompts(model, config)
