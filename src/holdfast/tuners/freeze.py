"""Freezing: only the last blocks of the model are trained."""

from __future__ import annotations

from typing import Any

from pydantic import Field
from torch import nn
from transformers import PreTrainedModel

from holdfast.config.section import Section
from holdfast.errors import ConfigError
from holdfast.models.kinds import is_seq2seq, sees
from holdfast.models.seq2seq import decoder_depth
from holdfast.tuners.full import Full


class Freeze(Full):
    """Train the last decoder blocks and the final norm; everything below them is frozen."""

    name = "freeze"

    class Options(Section):
        blocks: int = Field(2, ge=1, description="last decoder blocks that are trained")
        norm: bool = Field(True, description="train the norm after the last block, too")
        head: bool = Field(
            False, description="train the output head, too; where it is tied to the embeddings, they are one matrix"
        )

    def prepare(self, model: PreTrainedModel) -> PreTrainedModel:
        """Raises ConfigError if the model has fewer decoder blocks."""
        blocks, norm = decoder(model)
        if self.options.blocks > len(blocks):
            raise ConfigError(
                f"tuner freeze: blocks: {self.options.blocks} are more than the model's {len(blocks)}; tuner full "
                "trains all of them"
            )
        model.requires_grad_(False)
        trained: list[Any] = list(blocks[-self.options.blocks :])
        trained += [norm] if self.options.norm else []
        trained += [model.get_output_embeddings()] if self.options.head else []
        for part in trained:
            part.requires_grad_(True)
        return model


def decoder(model: PreTrainedModel) -> tuple[nn.ModuleList, nn.Module]:
    """A language model's decoder blocks and the norm after the last one.

    Raises:
        ConfigError: they are not found.
    """
    config, whole = model.config.get_text_config(), model
    count = config.num_hidden_layers
    if sees(model.config):
        whole = model.get_decoder()
    if is_seq2seq(config):
        whole, count = model.get_decoder(), decoder_depth(config)
    for module in whole.modules():
        for blocks in module.children():
            if isinstance(blocks, nn.ModuleList) and len(blocks) == count:
                norm = next((part for name, part in module.named_children() if name in FINAL_NORMS), None)
                if norm is not None:
                    return blocks, norm
    raise ConfigError(
        f"tuner freeze: the decoder blocks and the final norm ({' or '.join(FINAL_NORMS)}) of {type(model).__name__} "
        "are not found; tuner full or lora would do"
    )


FINAL_NORMS = ("norm", "ln_f", "final_layer_norm", "final_layernorm")
"""transformers' names of the norm after the last block."""
