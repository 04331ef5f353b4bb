"""The PEFT configuration of dual prefixes."""

from __future__ import annotations

from dataclasses import dataclass

from peft import PeftConfig
from peft.utils.peft_types import PeftType

from holdfast.errors import ConfigError


@dataclass
class DualPrefixConfig(PeftConfig):
    """Configuration of :class:`~holdfast.tuners.dual_prefix.model.DualPrefixModel`.

    Attributes:
        general_layers: first attention layers, with general prefixes; if None, a sixth of them, at least one.
        general_length: keys and values of a general prefix.
        expert_length: keys and values of a task's own prefix.
        target_modules: names, or a regular expression, of the attention modules that get a prefix. If None, those of
            all layers are looked up in the model.
        exclude_modules: names, or a regular expression, of modules that get none.
        modules_to_save: names of modules that are trained in full and saved with the prefixes.

    Raises:
        ConfigError: a value cannot be used.
    """

    general_layers: int | None = None
    general_length: int = 5
    expert_length: int = 20
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType("DUAL_PREFIX")
        if self.general_layers is not None and self.general_layers < 0:
            raise ConfigError(f"general_layers: is {self.general_layers}; it must be at least 0")
        for key in ("general_length", "expert_length"):
            if getattr(self, key) < 1:
                raise ConfigError(f"{key}: is {getattr(self, key)}; it must be at least 1")
