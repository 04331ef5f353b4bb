"""holdfast teaches a language model one task after another without it forgetting what it knew."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from holdfast.config import RunConfig, load_config
    from holdfast.methods.base import Method
    from holdfast.runner import run
    from holdfast.trainer import ContinualTrainer, continual

__version__ = "0.1.0"
__all__ = ["ContinualTrainer", "Method", "RunConfig", "continual", "load_config", "run"]

_HOME = {
    "ContinualTrainer": "holdfast.trainer",
    "Method": "holdfast.methods.base",
    "RunConfig": "holdfast.config",
    "continual": "holdfast.trainer",
    "load_config": "holdfast.config",
    "run": "holdfast.runner",
}


def __getattr__(name: str) -> Any:
    """Import on first use, so that `import holdfast` and `holdfast --help` do not wait for torch."""
    if name not in _HOME:
        raise AttributeError(f"module 'holdfast' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
