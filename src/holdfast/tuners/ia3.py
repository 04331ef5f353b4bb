"""IA3: keys, values and the inputs of each feed-forward output are scaled by trained vectors (PEFT's own)."""

from __future__ import annotations

from typing import Any

from peft import IA3Config
from peft.utils.constants import (
    TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING,
    TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING,
)
from pydantic import ConfigDict, Field, model_validator
from transformers import PreTrainedModel

from holdfast.api.tuner import TargetOptions
from holdfast.errors import ConfigError
from holdfast.models.seq2seq import task_type
from holdfast.tuners.peft import PeftTuner


class IA3(PeftTuner):
    """IA3 (Liu et al., 2022, arXiv 2205.05638): learned vectors by which keys, values and activations are scaled."""

    name = "ia3"
    config_class = IA3Config

    class Options(TargetOptions):
        """IA3's options; any other field of peft.IA3Config may be given by its name."""

        model_config = ConfigDict(extra="allow")

        target_modules: str | list[str] | None = Field(
            None,
            description="names of the scaled layers; where absent, PEFT's for the architecture, or else keys, values "
            "and the last layer of each feed-forward network, found by their names",
        )
        feedforward_modules: str | list[str] | None = Field(
            None, description="those of target_modules of which the input is scaled, not the output"
        )

        @model_validator(mode="after")
        def _both(self) -> IA3.Options:
            if (self.target_modules is None) != (self.feedforward_modules is None):
                raise ValueError("target_modules and feedforward_modules: give both, or neither")
            return self

    def config(self, model: PreTrainedModel) -> IA3Config:
        options: dict[str, Any] = self.fields()
        if options["target_modules"] is None:
            options |= scaled_layers(model)
        return IA3Config(task_type=task_type(model), **options)


def scaled_layers(model: PreTrainedModel) -> dict[str, list[str]]:
    """``target_modules`` and ``feedforward_modules`` for a model.

    Raises:
        ConfigError: PEFT does not know the architecture, and no layer has a known name.
    """
    architecture = model.config.get_text_config().model_type
    if architecture in TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING:
        return {
            "target_modules": TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING[architecture],
            "feedforward_modules": TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING[architecture],
        }
    layers = {".".join(name.split(".")[-2:]) for name, part in model.named_modules() if hasattr(part, "weight")}
    attention, feedforward = (
        [end for end in ends if any(f".{name}".endswith(f".{end}") for name in layers)]
        for ends in (ATTENTION, FEEDFORWARD)
    )
    if not attention or not feedforward:
        raise ConfigError(
            f"tuner ia3: neither PEFT nor holdfast knows the layers of {architecture!r}; name them in target_modules "
            "(keys, values and the last layer of each feed-forward network) and feedforward_modules (the last ones "
            "of these)"
        )
    return {"target_modules": attention + feedforward, "feedforward_modules": feedforward}


ATTENTION = ("k_proj", "v_proj", "qkv_proj", "query_key_value", "c_attn", "Wqkv")
FEEDFORWARD = ("down_proj", "fc2", "dense_4h_to_h", "mlp.c_proj", "fc_out", "w2", "mlp.output_linear")
