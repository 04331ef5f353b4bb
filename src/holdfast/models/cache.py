"""The cache of keys and values by its name: ``cache`` since transformers 5.24, ``past_key_values`` before it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

NAMES = ("cache", "past_key_values", "layer_past")


def cache_name(module: Any) -> str | None:
    """The argument of a module's forward pass that is its cache; None: it takes none."""
    parameters = inspect.signature(module.forward).parameters
    return next((name for name in NAMES if name in parameters), None)


def cache_of(values: Mapping[str, Any]) -> Any:
    """The cache among a forward pass's arguments or outputs; None: there is none."""
    return next((values[name] for name in NAMES if values.get(name) is not None), None)
