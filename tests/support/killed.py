"""Runs a configuration and kills its own process with SIGKILL at a given point; the tests of resuming start it.

usage: python killed.py CONFIG.json [POINT COUNT] [backfill]: die when POINT is reached for the COUNT-th time.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import torch
from transformers import TrainerCallback

import holdfast.models.answers
import holdfast.records.directory
import holdfast.runner.loop
import holdfast.runner.matrix
import holdfast.runner.run
import holdfast.training.engine_mixin
from holdfast.methods.replay import Replay
from holdfast.system.progress import Progress

POINTS = {
    "step": (TrainerCallback, "on_step_end"),
    "checkpoint": (torch, "save"),  # optimizer, scheduler and RNG of a checkpoint are being written
    "manifest": (holdfast.training.engine_mixin, "complete_checkpoint"),
    "after_stage": (Replay, "after_stage"),
    "weights": (holdfast.runner.loop, "save_states"),  # the stage's weights stand, its manifest does not
    "answers": (holdfast.models.answers.AnswerCache, "_add"),  # a batch of an evaluation is answered
    "response": (holdfast.records.directory.RunDirectory, "write_jsonl"),  # one task of an evaluation is done
    "matrix": (holdfast.runner.matrix, "summarize"),
    "report": (holdfast.runner.loop.RunLoop, "_report"),
}


def die_at(point: str, count: int) -> None:
    owner, name = POINTS[point]
    original = getattr(owner, name)
    left = [count]

    def counted(*args, **kwargs):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(owner, name, counted)


if __name__ == "__main__":
    path, *point = sys.argv[1:]
    backfill = point[-1:] == ["backfill"]
    if len(point) > 1:
        die_at(point[0], int(point[1]))
    torch.set_num_threads(1)
    config = json.loads(Path(path).read_text(encoding="utf-8"))
    holdfast.runner.run.run(config, Progress(quiet=True), backfill=backfill)
