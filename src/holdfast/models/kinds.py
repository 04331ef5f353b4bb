"""What kind of a model a configuration describes: causal, sequence-to-sequence, or one that sees."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from transformers import PretrainedConfig

Target = Literal["language", "vision", "projector", "all"]
"""The parts of a model that sees, one of which or all are trained."""


def is_seq2seq(config: PretrainedConfig) -> bool:
    """Whether a model with this configuration has an encoder that reads the prompt, and a decoder that answers."""
    return bool(getattr(config, "is_encoder_decoder", False))


def sees(config: PretrainedConfig) -> bool:
    """Whether a model with this configuration reads pictures beside text, and answers in text."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    known = config.model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    return known and getattr(config, "vision_config", None) is not None and not is_seq2seq(config)


def auto_class(config: PretrainedConfig) -> Any:
    """transformers' class that loads a model with this configuration and its language model head."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForSeq2SeqLM

    if sees(config):
        return AutoModelForImageTextToText
    return AutoModelForSeq2SeqLM if is_seq2seq(config) else AutoModelForCausalLM
