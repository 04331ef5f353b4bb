"""A pool of soft prompts with keys: each row uses the prompts whose keys are nearest to it."""

from __future__ import annotations

from pathlib import Path

from peft import PromptTuningConfig
from pydantic import Field, model_validator
from transformers import PreTrainedModel

from holdfast.api.tuner import Tuner
from holdfast.config.section import Section
from holdfast.tuners.soft_prompts import NOT_MERGED, PromptPoolModel


class PromptPool(Tuner):
    """Prompt pool (Wang et al., 2022, Learning to Prompt, arXiv 2112.08654): soft prompts, chosen row by row by key."""

    name = "prompt_pool"
    text_only = "its prompts stand before the embeddings of text, in which such a model looks for its pictures by token"
    causal_only = "its prompts are chosen and placed in the one sequence that a causal model reads"
    folder = "adapter"
    not_merged = NOT_MERGED
    lacks = (
        "plain PEFT loads this folder but puts all prompts of the pool before every row, instead of those nearest to "
        "it, and so answers wrongly; load it with holdfast.soft_prompts.PromptPoolModel.from_folder(model, folder); "
        "vLLM and `transformers serve` do not load it"
    )

    class Options(Section):
        """The defaults are those of the published code for a stream of different data sets (5-datasets)."""

        size: int = Field(20, ge=1, description="M, prompts in the pool")
        length: int = Field(10, ge=1, description="L_p, embeddings in a prompt")
        top_k: int = Field(4, ge=1, description="N, prompts that a row gets")
        init: str = Field(
            "SAMPLE_VOCAB",
            pattern="^(SAMPLE_VOCAB|RANDOM)$",
            description="SAMPLE_VOCAB: prompts begin as embeddings of random tokens; RANDOM: standard normal",
        )

        @model_validator(mode="after")
        def _enough(self) -> PromptPool.Options:
            if self.top_k > self.size:
                raise ValueError(f"top_k: {self.top_k} prompts cannot be chosen from a pool of {self.size}")
            return self

    @property
    def virtual_tokens(self) -> int:
        return self.options.top_k * self.options.length

    def prepare(self, model: PreTrainedModel) -> PromptPoolModel:
        size, length, top_k = self.options.size, self.options.length, self.options.top_k
        config = PromptTuningConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=size * length, prompt_tuning_init=self.options.init
        )
        return PromptPoolModel(model, config, size, length, top_k)

    def load(self, model: PromptPoolModel, folder: Path) -> None:
        model.load_adapter(str(folder), model.active_adapter, is_trainable=True)
