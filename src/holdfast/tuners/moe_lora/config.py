"""The PEFT configuration of a mixture of LoRA experts."""

from __future__ import annotations

from dataclasses import dataclass

from peft import PeftConfig
from peft.utils.peft_types import PeftType

from holdfast.errors import ConfigError


@dataclass
class MoeLoraConfig(PeftConfig):
    """Configuration of :class:`~holdfast.tuners.moe_lora.model.MoeLoraModel`.

    Attributes:
        r: rank of all experts together.
        experts: experts in each layer, each of rank r / experts.
        top_k: experts that a token uses; if None, all of them.
        lora_alpha: the update is scaled by lora_alpha / r.
        lora_dropout: on the experts' input, not on the router's.
        target_modules: names, or a regular expression, of the linear layers to adapt; ``all-linear``: all but the head.
        exclude_modules: names, or a regular expression, of layers that are left as they are.
        modules_to_save: names of modules that are trained in full and saved with the adapter.
        init_weights: if False, B begins random, so that an untrained mixture changes the model; for tests, as in PEFT's
            own types.

    Raises:
        ConfigError: a value cannot be used.
    """

    r: int = 16
    experts: int = 4
    top_k: int | None = None
    lora_alpha: float = 32
    lora_dropout: float = 0.05
    target_modules: list[str] | str = "all-linear"
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    init_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType("MOE_LORA")
        if self.experts < 2:
            raise ConfigError(f"experts: is {self.experts}; a mixture has at least 2")
        if self.r < 1 or self.r % self.experts:
            raise ConfigError(
                f"r: {self.r} cannot be split evenly among {self.experts} experts; "
                f"{max(self.experts, round(self.r / self.experts) * self.experts)} would be the nearest"
            )
        if self.top_k is not None and not 1 <= self.top_k <= self.experts:
            raise ConfigError(f"top_k: {self.top_k} cannot be chosen from {self.experts} experts")
