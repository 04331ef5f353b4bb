"""Dual prefixes: trained keys and values before those of each attention layer, some for all tasks, some for one.

Importing it registers the type with PEFT.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model, set_peft_model_state_dict
from peft.utils import load_peft_weights
from pydantic import Field
from transformers import PreTrainedModel

from holdfast.api.tuner import Tuner
from holdfast.config.section import Section
from holdfast.engines.whole import former_names
from holdfast.tuners.dual_prefix.config import DualPrefixConfig
from holdfast.tuners.dual_prefix.layer import PerTask, PrefixAttention
from holdfast.tuners.dual_prefix.model import DualPrefixModel
from holdfast.tuners.peft_types import UNKNOWN, register

__all__ = ["DualPrefix", "DualPrefixConfig", "DualPrefixModel", "PerTask", "PrefixAttention"]


class DualPrefix(Tuner):
    """Prefixes of the attention layers, general ones and a task's own (Wang et al., 2022, arXiv 2204.04799).

    A layer with prefix keys P_K and values P_V attends to [P_K; K] and [P_V; V] (Pre-T in the paper). Every token
    attends to the whole prefix; positions, hidden states and logits are those of the batch's own tokens alone. The
    first layers have general prefixes, the others a task's own. The model itself is frozen.
    """

    name = "dual_prefix"
    text_only = "its prefixes are keys and values before the first token, after which such a model reads no pictures"
    causal_only = "its prefixes are placed in the layers of one stack of decoder blocks"
    folder = "adapter"
    not_merged = "its trained prefixes stand before the input and change no weight"
    lacks = UNKNOWN.format(name=name, module=__name__)

    class Options(Section):
        general_layers: int | None = Field(
            None, ge=0, description="first layers, with general prefixes; where absent, a sixth of them, at least one"
        )
        general_length: int = Field(5, ge=1, description="keys and values of a general prefix")
        expert_length: int = Field(20, ge=1, description="keys and values of a task's own prefix")

    def prepare(self, model: PreTrainedModel) -> PeftModel:
        """Raises ConfigError if the model's attention takes no prefix or has too few layers."""
        return get_peft_model(model, DualPrefixConfig(task_type="CAUSAL_LM", **self.options.model_dump()))

    def load(self, model: Any, folder: Path) -> None:
        """Files of version 0.1.0, too, whatever PEFT's version."""
        names = former_names(model).items()
        now = {former: name.replace(f".{model.active_adapter}.", ".") for name, former in names}
        saved = load_peft_weights(str(folder), device="cpu")
        set_peft_model_state_dict(model, {now.get(name, name): t for name, t in saved.items()})


register("dual_prefix", DualPrefixConfig, DualPrefixModel)
