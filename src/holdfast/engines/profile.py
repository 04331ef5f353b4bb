"""What an engine asks of a run beside the layout of its parameters; ddp asks nothing."""

from __future__ import annotations

from typing import Any


class Profile:
    """``training.engine`` by name. An engine overrides what differs from DDP."""

    def check(self) -> None:
        """ConfigError if what the engine needs is not installed."""

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
