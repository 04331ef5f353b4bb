"""LiNeS: after a stage, shallow layers go back towards the weights that it began with, deep ones keep their own."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from pydantic import Field
from torch import nn

from holdfast.methods.parts.interpolation import Coefficients, Interpolation, InterpolationOptions
from holdfast.models.head import base
from holdfast.models.kinds import is_seq2seq
from holdfast.models.seq2seq import decoder_depth

NUMBERED = re.compile(r"(.*?)\.(\d+)\.")
"""The name of a weight in a numbered block: what stands before the number, and the number."""


class LiNeS(Interpolation):
    """LiNeS, layer-increasing network scaling (Wang et al., 2024, arXiv 2410.17146).

    theta_l = theta_start,l + (alpha + beta (l - 1) / (L - 1)) (theta_end,l - theta_start,l) for block l of L. Weights
    outside the blocks have the factor alpha. The encoder and the decoder of a sequence-to-sequence model each count
    their own blocks.
    """

    name = "lines"

    class Options(InterpolationOptions):
        alpha: Coefficients = Field(
            0.5, description="factor of the first block's change; of a list, the task's dev split chooses"
        )
        beta: float | None = Field(
            None,
            ge=0,
            description="how much larger the last block's factor is; absent: 1 - alpha, so that it keeps all",
        )

    options: Options

    def factors(self, alpha: float, names: Sequence[str], model: nn.Module) -> dict[str, float]:
        depths = relative_depths(model)
        beta = 1 - alpha if self.options.beta is None else self.options.beta
        return {name: alpha + beta * depths.get(name, 0.0) for name in names}


def relative_depths(model: nn.Module) -> dict[str, float]:
    """How deep the block lies that each weight belongs to, by the weight's name: 0 for the first block, 1 for the last.

    Weights outside the blocks are left out.
    """
    config: Any = base(model).config.get_text_config()
    lengths = {config.num_hidden_layers} | ({decoder_depth(config)} if is_seq2seq(config) else set())
    found = {name: match for name, _ in model.named_parameters() if (match := NUMBERED.match(name))}
    numbers: dict[str, set[int]] = {}
    for match in found.values():
        numbers.setdefault(match[1], set()).add(int(match[2]))
    stacks = {
        prefix: len(own) for prefix, own in numbers.items() if own == set(range(len(own))) and len(own) in lengths
    }
    return {name: int(m[2]) / max(stacks[m[1]] - 1, 1) for name, m in found.items() if m[1] in stacks}
