"""A tiny sweep."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from support.tiny import tiny_config


def tiny_sweep(folder: Path, **changes: Any) -> dict[str, Any]:
    """Twelve runs of one stage and two steps: three methods, two rates, two seeds."""
    base = tiny_config(folder)
    del base["output"]
    base["stream"]["order"] = ["red"]
    base["training"] = {"max_steps": 2, "batch_size": 4, "learning_rate": 1e-2}
    base["evaluation"] = {"max_new_tokens": 2, "bootstrap": 0}
    grid = {
        "method": ["sequential", {"name": "ewc", "strength": 10.0}, "joint"],
        "training.learning_rate": [1e-2, 3e-3],
        "seed": [0, 1],
    }
    return {"output": str(folder / "sweep"), "run": base, "grid": grid} | changes
