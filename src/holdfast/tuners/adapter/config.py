"""The PEFT configuration of a bottleneck adapter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from peft import PeftConfig
from peft.utils.peft_types import PeftType
from transformers.activations import ACT2FN

from holdfast.errors import ConfigError, did_you_mean


@dataclass
class AdapterConfig(PeftConfig):
    """Configuration of :class:`~holdfast.tuners.adapter.model.AdapterModel`.

    Attributes:
        placement: ``houlsby``: after attention and after the MLP of each block; ``pfeiffer``: after the MLP;
            ``parallel``: beside the MLP, on the same input.
        bottleneck: units between the two projections.
        non_linearity: a name in transformers' ACT2FN; where None, gelu for houlsby and relu for the others.
        scale: the adapter's output is multiplied by it; where None, 4 for parallel and 1 for the others.
        dropout: on the bottleneck's units, after the non-linearity.
        target_modules: names, or a regular expression, of the modules that get an adapter. They return hidden states,
            alone or first in a tuple. If None, the placement's modules are looked up in the model.
        exclude_modules: names, or a regular expression, of modules that get none.
        modules_to_save: names of modules that are trained in full and saved with the adapter.
        init_weights: if False, ``up`` begins random, so that an untrained adapter changes the model; for tests, as in
            PEFT's own types.

    Raises:
        ConfigError: a value cannot be used.
    """

    placement: Literal["houlsby", "pfeiffer", "parallel"] = "houlsby"
    bottleneck: int = 64
    non_linearity: str | None = None
    scale: float | None = None
    dropout: float = 0.0
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    init_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType("ADAPTER")
        placements = ("houlsby", "pfeiffer", "parallel")
        if self.placement not in placements:
            raise ConfigError(f"placement: is {self.placement!r}{did_you_mean(self.placement, placements)}")
        if self.bottleneck < 1:
            raise ConfigError(f"bottleneck: is {self.bottleneck}; it must be at least 1")
        if self.non_linearity is None:
            self.non_linearity = "gelu" if self.placement == "houlsby" else "relu"
        if self.non_linearity not in ACT2FN:
            raise ConfigError(
                f"non_linearity: transformers has none called {self.non_linearity!r}"
                f"{did_you_mean(self.non_linearity, ACT2FN)}"
            )
        if self.scale is None:
            self.scale = 4.0 if self.placement == "parallel" else 1.0
