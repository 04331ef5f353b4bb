"""A new model from a size: width and depth, or a number of parameters."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerBase, Qwen3Config, set_seed

from holdfast.errors import ConfigError
from holdfast.lab.config import SizeConfig

FAMILIES: dict[str, Any] = {"llama": LlamaConfig, "qwen3": Qwen3Config}


def new_model(
    size: SizeConfig, tokenizer: PreTrainedTokenizerBase, context: int, seed: int, attention: str | None = None
) -> Any:
    """Make a model with random weights; the same arguments give the same weights on one machine.

    Every matrix is drawn with standard deviation fan_in^(-1/2), as in "Forgetting in Language Models" (arXiv
    2605.26097), and the embeddings with 0.02.

    Args:
        tokenizer: gives the size of the vocabulary and the special tokens.
        context: tokens that the model reads at most.
        attention: implementation of attention; that of transformers where absent.

    Raises:
        ConfigError: no model of this family comes near the number of parameters.
    """
    config = architecture(size, len(tokenizer), context)
    config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    config.pad_token_id = tokenizer.pad_token_id
    set_seed(seed)
    options = {"attn_implementation": attention} if attention else {}
    model = AutoModelForCausalLM.from_config(config, **options)
    for module in model.modules():
        if isinstance(module, nn.Linear) and not (size.tie_embeddings and module is model.get_output_embeddings()):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
    return model


def architecture(size: SizeConfig, vocab_size: int, context: int) -> Any:
    """The transformers configuration of a size.

    Where the size is a number of parameters, the depth is width / 64, rounded and at least 2, and the width is the
    multiple of ``head_size`` whose model comes nearest to that number.

    Raises:
        ConfigError: the nearest model differs from the number of parameters by more than a quarter.
    """
    width, depth = size.width, size.depth
    if size.parameters is not None:
        shapes = [(w, max(2, round(w / 64))) for w in range(size.head_size, 64 * size.head_size + 1, size.head_size)]
        wanted = size.parameters
        width, depth = min(shapes, key=lambda shape: abs(_parameters(size, shape[0], shape[1], vocab_size) - wanted))
        nearest = _parameters(size, width, depth, vocab_size)
        if abs(nearest - wanted) > wanted / 4:
            raise ConfigError(
                f"model.parameters: the model nearest to {wanted:,} has {nearest:,} (width {width}, depth {depth}, "
                f"vocabulary {vocab_size:,}); give another number or head_size, or width and depth"
            )
    assert width is not None and depth is not None
    heads = width // size.head_size
    return FAMILIES[size.family](
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=_mlp_width(size, width),
        num_hidden_layers=depth,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=size.head_size,
        max_position_embeddings=context,
        tie_word_embeddings=size.tie_embeddings,
    )


def counted_parameters(model: Any) -> int:
    """Count a model's weights as the paper does, 12 L D² + D V: embeddings count only where they are the head, too."""
    embeddings, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    total = sum(p.numel() for p in model.parameters())
    return total - (0 if head is embeddings else embeddings.numel())


def _mlp_width(size: SizeConfig, width: int) -> int:
    """The width of the feed-forward layers.

    By default it is 8/3 of the model's: these three matrices then have as many weights as the paper's two, which have
    four times the width.
    """
    return size.mlp_width or -(-8 * width // 24) * 8


def _parameters(size: SizeConfig, width: int, depth: int, vocab_size: int) -> int:
    return depth * (4 * width**2 + 3 * width * _mlp_width(size, width)) + width * vocab_size
