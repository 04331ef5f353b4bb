"""A trainer's checkpoint on disk: which one is complete, and its weights."""

from __future__ import annotations

import shutil
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

SCHEDULER_NAME = "scheduler.pt"
COMPLETE = "complete.json"
"""Written last into a checkpoint: one without it was cut off while it was written."""


def saved_weights(folder: Path) -> dict[str, Tensor]:
    """The weights that save_pretrained wrote, in one file or several."""
    return {name: t for path in sorted(folder.glob("model*.safetensors")) for name, t in load_file(path).items()}


def newest_whole_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was written to its end; those that were cut off are removed."""
    whole = []
    for path in folder.glob("checkpoint-*"):
        if (path / COMPLETE).exists():
            whole.append(path)
        else:
            shutil.rmtree(path)
    return max(whole, key=lambda path: int(path.name.rpartition("-")[2]), default=None)
