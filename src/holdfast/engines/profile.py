"""What an engine asks of a run beside the layout of its parameters; ddp asks nothing."""

from __future__ import annotations

from typing import Any

from holdfast.engines.layout import Layout


class Profile:
    """``training.engine`` by name. An engine overrides what differs from DDP."""

    def check(self, optimizer: str) -> None:
        """Check what the engine needs.

        Args:
            optimizer: transformers' name.

        Raises:
            ConfigError: it is not installed, or the optimizer cannot train with it.
        """
        Layout().check_optimizer(optimizer)

    def loading_options(self) -> dict[str, Any]:
        """Options of ``from_pretrained``."""
        return {}

    def arguments(self) -> dict[str, Any]:
        """Values of TrainingArguments; they are made right after this call."""
        return {}

    def complete(self, arguments: Any, bfloat16: bool) -> None:
        """Change TrainingArguments that were just made.

        Args:
            bfloat16: whether the run asks for mixed precision.
        """
