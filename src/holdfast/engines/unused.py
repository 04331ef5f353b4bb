"""DeepSpeed is imported by runs on its engines alone: that takes some seconds, and brings MLflow along."""

from __future__ import annotations

import sys

from accelerate.utils import other


def leave_deepspeed_unimported() -> None:
    """Let accelerate look for a model of DeepSpeed's only once something has imported DeepSpeed.

    To save a model, transformers and PEFT ask accelerate what lies within it, and that imports DeepSpeed wherever it is
    installed. No model is one of DeepSpeed's before it is imported.
    """
    other.is_deepspeed_available = _deepspeed_is_imported


def _deepspeed_is_imported() -> bool:
    return "deepspeed" in sys.modules
