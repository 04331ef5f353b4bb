"""A trainer's checkpoints on disk: which of them are complete, and their weights."""

from __future__ import annotations

import shutil
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

SCHEDULER_NAME = "scheduler.pt"
COMPLETE = "complete.json"
"""The last file of a checkpoint; a checkpoint without it was cut off while it was written."""


def saved_weights(folder: Path) -> dict[str, Tensor]:
    """Load the weights that ``save_pretrained`` wrote, from one file or several."""
    return {name: t for path in sorted(folder.glob("model*.safetensors")) for name, t in load_file(path).items()}


def newest_whole_checkpoint(folder: Path) -> Path | None:
    """Return the newest complete checkpoint below ``folder``, if there is one; remove those that were cut off."""
    complete = []
    for path in folder.glob("checkpoint-*"):
        if (path / COMPLETE).exists():
            complete.append(path)
        else:
            shutil.rmtree(path)
    return max(complete, key=lambda path: int(path.name.rpartition("-")[2]), default=None)
