"""OSF: all directions of each linear layer except the dominant ones are trained (PEFT's own)."""

from __future__ import annotations

from typing import Any

from peft import OSFConfig, PeftModel
from peft.tuners.osf import OSFLayer
from pydantic import ConfigDict, Field
from torch import nn
from transformers import PreTrainedModel

from holdfast.api.tuner import TargetOptions
from holdfast.engines.pieces import full
from holdfast.errors import ConfigError
from holdfast.tuners.peft import PeftTuner


class Osf(PeftTuner):
    """Orthogonal subspace fine-tuning (Nayak et al., 2025, arXiv 2504.07097), one adapter for all stages.

    The factors of each pretrained matrix are trained, without its dominant singular directions."""

    name = "osf"
    config_class = OSFConfig
    quantized = False

    class Options(TargetOptions):
        """OSF's options; any other field of peft.OSFConfig may be given by its name."""

        model_config = ConfigDict(extra="allow")

        effective_rank: int | float | None = Field(
            None,
            gt=0,
            description="singular directions of each pretrained matrix that stay as they are; below 1: as a share of "
            "its smaller side; where absent, half of them",
        )
        target_modules: str | list[str] = Field(
            "all-linear", description="names of the layers to adapt; all-linear: every linear layer but the head"
        )

    def wrap(self, model: PreTrainedModel, config: Any) -> PeftModel:
        """Raises ConfigError if no direction of a matrix would be trained."""
        wrapped = super().wrap(model, config)
        for module in wrapped.modules():
            if isinstance(module, OSFLayer):
                undivided(module)
        if not any(p.numel() for p in wrapped.parameters() if p.requires_grad):
            raise ConfigError(
                f"tuner osf: nothing would be trained with effective_rank {self.options.effective_rank} and "
                f"target_modules {self.options.target_modules}: it must leave directions of linear layers"
            )
        return wrapped


def undivided(layer: nn.Module) -> None:
    """Give each process whole factors of a matrix that an engine divides, as it has other tuners' weights."""
    for part in layer.modules():
        for name, p in part.named_parameters(recurse=False):
            if p.requires_grad and full(p) is not p:
                setattr(part, name, nn.Parameter(full(p.detach()).clone()))
        for name, buffer in part.named_buffers(recurse=False):
            setattr(part, name, full(buffer))
