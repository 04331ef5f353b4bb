"""O-LoRA: a new LoRA adapter a stage, orthogonal to all earlier ones, which stay active and unchanged."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import nn

from holdfast.api.stage import Stage, Step
from holdfast.config.section import Section
from holdfast.engines.shards import Shards
from holdfast.methods.parts.stacked_lora import EXCHANGES, NOT_WITH, PAST, StackedLoRA
from holdfast.tuners.lora_factors import TRAINED, factors


class OLoRA(StackedLoRA):
    """Orthogonal low-rank adaptation (Wang et al., 2023, arXiv 2310.14152): a new LoRA a stage, orthogonal to the past.

    L = L_task + lambda_1 * sum_{i<t} sum_{j,k} (A_i A_t^T)[j,k]^2 + lambda_2 * sum |A_t|_2 + |B_t|_2

    The first sum is the paper's objective. Its code has |.| in place of the square (``penalty: absolute``), and the
    last term, of which the paper gives only the values of lambda_2. Each sum is also over all adapted layers. After a
    stage the model has one adapter with the factors of all stages side by side: its rank grows by r a stage.
    """

    name = "o_lora"
    not_with = {"inflora": EXCHANGES, "n_lora": EXCHANGES, "gain_lora": EXCHANGES} | NOT_WITH

    class Options(Section):
        lambda_1: float = Field(0.5, ge=0, description="weight of the orthogonality loss; 0: none (IncLoRA)")
        lambda_2: float = Field(0.0, ge=0, description="weight of the norms of the new adapter's factors")
        penalty: Literal["squared", "absolute"] = Field(
            "squared", description="of each entry of A_i A_t^T; squared: as the paper says; absolute: as its code does"
        )

    options: Options

    def declares(self, stage: Stage) -> tuple[str, ...]:
        orthogonality = (self.name,) if self.options.lambda_1 and self.stages else ()
        return orthogonality + ((f"{self.name}/norm",) if self.options.lambda_2 else ())

    def after_backward(self, step: Step, gradients: Shards) -> dict[str, float]:
        model, terms = step.stage.model, self.declares(step.stage)
        values = {}
        if self.name in terms:
            values[self.name] = self.orthogonality(model, gradients)
        if f"{self.name}/norm" in terms:
            values[f"{self.name}/norm"] = self.norms(model, gradients)
        return {name: float(value) for name, value in values.items()} if step.logged else {}

    def orthogonality(self, model: nn.Module, gradients: Shards) -> torch.Tensor:
        """Add the gradient of the first term; return its value, a scalar."""
        new, past = factors(model), factors(model, PAST)
        total = torch.zeros((), device=next(iter(new.values())).device)
        for key in past:
            if key.endswith("lora_A"):
                overlap = new[key] @ past[key].T  # [r, r * earlier stages]
                squared = self.options.penalty == "squared"
                slope = 2 * overlap if squared else overlap.sign()
                gradients.add_whole_(f"{key}.{TRAINED}.weight", slope @ past[key], self.options.lambda_1)
                total += (overlap.square() if squared else overlap.abs()).sum()
        return self.options.lambda_1 * total

    def norms(self, model: nn.Module, gradients: Shards) -> torch.Tensor:
        """Add the gradient of the second term, which is zero at zero; return its value, a scalar."""
        new = factors(model)
        total = torch.zeros((), device=next(iter(new.values())).device)
        for key, w in new.items():
            norm = w.norm()
            slope = w / norm.clamp(min=torch.finfo(w.dtype).tiny)
            gradients.add_whole_(f"{key}.{TRAINED}.weight", slope, self.options.lambda_2)
            total += norm
        return self.options.lambda_2 * total
