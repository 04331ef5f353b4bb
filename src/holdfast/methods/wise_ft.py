"""WiSE-FT: after a stage, the weights are an average of those that it began and ended with."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field
from torch import nn

from holdfast.methods.parts.interpolation import NOT_WITH, Coefficients, Interpolation, InterpolationOptions


class WiSEFT(Interpolation):
    """WiSE-FT (Wortsman et al., 2021, arXiv 2109.01903): weight-space ensembles of the start and the end of a stage.

    theta = (1 - alpha) theta_start + alpha theta_end, with theta_start the weights that the stage began with.
    """

    name = "wise_ft"
    not_with = {"lines": "each sets the final weights of a stage"} | NOT_WITH

    class Options(InterpolationOptions):
        alpha: Coefficients = Field(
            0.5, description="weight of the stage's own weights; of a list, the task's dev split chooses"
        )

    options: Options

    def factors(self, alpha: float, names: Sequence[str], model: nn.Module) -> dict[str, float]:
        return dict.fromkeys(names, alpha)
