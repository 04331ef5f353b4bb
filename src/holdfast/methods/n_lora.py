"""N-LoRA: a new LoRA adapter a stage whose update is sparse, so that it collides with few entries of earlier ones."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn

from holdfast.engines.shards import Shards
from holdfast.methods.parts.factor_penalty import FactorPenalty
from holdfast.methods.parts.stacked_lora import EXCHANGES, NOT_WITH, StackedLoRA
from holdfast.tuners.lora_factors import TRAINED, factors


class NLoRA(FactorPenalty, StackedLoRA):
    """Non-collision low-rank adaptation (Yang et al., 2024, arXiv 2410.10179): the new stage's update is sparse.

    L = L_task + strength * sum |B_t A_t|_1, over the entries of the update and the adapted layers

    Updates of two stages collide in an entry that both change; the sparser they are, the fewer do. Earlier updates
    stay active and unchanged.
    """

    name = "n_lora"
    not_with = {"o_lora": EXCHANGES, "inflora": EXCHANGES, "gain_lora": EXCHANGES} | NOT_WITH

    class Options(FactorPenalty.Options):
        strength: float = Field(1e-4, ge=0, description="lambda, the weight of the update's absolute entries")

    options: Options

    @torch.no_grad()
    def penalty(self, model: nn.Module, gradients: Shards) -> Tensor:
        """Add the term's gradient, with sign(0) = 0; return its value, a scalar."""
        new = factors(model)
        total = torch.zeros((), device=next(iter(new.values())).device)
        for key, a in new.items():
            if key.endswith("lora_A"):
                other = f"{key.removesuffix('lora_A')}lora_B"
                b = new[other]
                update = b @ a  # [out, in]
                total += update.abs().sum()
                sign = update.sign_()
                gradients.add_whole_(f"{key}.{TRAINED}.weight", b.T @ sign, self.options.strength)
                gradients.add_whole_(f"{other}.{TRAINED}.weight", sign @ a.T, self.options.strength)
        return self.options.strength * total
