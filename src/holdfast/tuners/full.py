"""Full fine-tuning: every weight is trained."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedModel

from holdfast.api.tuner import TargetOptions, Tuner
from holdfast.engines.vectors import weights
from holdfast.models.parts import trained_part
from holdfast.models.weights import load_language_model


class Full(Tuner):
    """Train every weight of the model."""

    name = "full"
    folder = "model"
    quantized = False

    class Options(TargetOptions):
        """Which weights are trained."""

    def prepare(self, model: PreTrainedModel) -> PreTrainedModel:
        trained_part(model, self.options.target)
        return model

    def load(self, model: PreTrainedModel, folder: Path) -> None:
        saved = load_language_model(folder, key="model", dtype=model.dtype)
        weights(model).load_(dict(saved.named_parameters()))
