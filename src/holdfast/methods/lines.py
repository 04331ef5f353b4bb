"""LiNeS: after a stage, shallow layers go back towards the weights that it began with, deep ones keep their own."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from pydantic import Field
from torch import nn

from holdfast.methods.parts.interpolation import Coefficients, Interpolation, InterpolationOptions
from holdfast.models.head import base

NUMBERED = re.compile(r"(.*?)\.(\d+)\.")
"""The name of a weight in a numbered block: what stands before the number, and the number."""


class LiNeS(Interpolation):
    """LiNeS, layer-increasing network scaling (Wang et al., 2024, arXiv 2410.17146).

    theta_l = theta_start,l + (alpha + beta (l - 1) / (L - 1)) (theta_end,l - theta_start,l) for block l of L. Weights
    outside the blocks have the factor alpha.
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
        blocks, depth = block_numbers(model)
        beta = 1 - alpha if self.options.beta is None else self.options.beta
        return {name: alpha + beta * blocks.get(name, 0) / max(depth - 1, 1) for name in names}


def block_numbers(model: nn.Module) -> tuple[dict[str, int], int]:
    """The number, from 0, of the decoder block that each weight lies in, by the weight's name; and how many there are.

    Weights outside the decoder's blocks are left out.
    """
    inner: Any = base(model)
    depth = inner.config.get_text_config().num_hidden_layers
    found = {name: match for name, _ in model.named_parameters() if (match := NUMBERED.match(name))}
    numbers: dict[str, set[int]] = {}
    for match in found.values():
        numbers.setdefault(match[1], set()).add(int(match[2]))
    decoders = {prefix for prefix, own in numbers.items() if own == set(range(depth))}
    return {name: int(match[2]) for name, match in found.items() if match[1] in decoders}, depth
