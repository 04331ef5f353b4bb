"""Runs configurations one after another in processes that train together; the tests of engines start it by torchrun.

usage: torchrun --nproc-per-node N engine_worker.py CONFIGS.json [kill STAGE STEP | copy STEP | count]

CONFIGS.json is a list of configurations. One that fails leaves error.txt in its output and ends all processes. kill:
the last process dies by SIGKILL after that step. copy: leave what lies on the disk after that step of the last stage
in OUTPUT-broken. count: leave counts.json beside the results: the last stage's steps,
how many sums over processes it asked for, how many divided tensors were made whole between its first and its last step,
and how many entries of vectors its methods held in this process at most.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch
from torch.distributed.tensor import DTensor

from holdfast.engines.process import Process
from holdfast.engines.shards import Shards
from holdfast.engines.zero.layout import Partitioned
from holdfast.engines.zero.parts import Part
from holdfast.runner.loop import run
from holdfast.runner.stage import StageWatch
from holdfast.system.files import write_json
from holdfast.system.progress import Progress


def after_each_step(look: Callable[[Any, Any], None]) -> None:
    """Call ``look`` with the watching callback and the trainer's state."""
    original = StageWatch.on_step_end

    def on_step_end(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        original(self, args, state, control, **kwargs)
        look(self, state)

    StageWatch.on_step_end = on_step_end  # type: ignore[method-assign]


def kill(stage: int, step: int) -> None:
    def look(watch: Any, state: Any) -> None:
        process = Process.this()
        if (watch.stage.index, state.global_step) == (stage, step) and process.rank == process.world - 1:
            os.kill(os.getpid(), signal.SIGKILL)

    after_each_step(look)


def copy(step: int) -> None:
    def look(watch: Any, state: Any) -> None:
        output = Path(watch.trainer.args.output_dir).parents[2]
        if state.global_step == step and Process.this().main:
            broken = output.with_name(f"{output.name}-broken")
            shutil.rmtree(broken, ignore_errors=True)
            shutil.copytree(output, broken)

    after_each_step(look)


class Count:
    """Sums over processes and vectors held, of the stage that trains."""

    def __init__(self) -> None:
        self.found = {"steps": 0, "sums": 0, "gathers": 0, "entries": 0}
        self.now = {"sums": 0, "gathers": 0}
        self.at_first = dict(self.now)
        self.stack = 0
        after_each_step(self.look)
        for owner, name in ((Process, "all_reduce_sum"), (Shards, "all_reduce_")):
            self.counted("sums", owner, name)
        for owner, name in ((Partitioned, "full"), (Part, "join"), (DTensor, "full_tensor")):
            self.counted("gathers", owner, name)
        stacked = Shards.stack.__func__  # type: ignore[attr-defined]

        def stack(cls: Any, vectors: Any) -> Shards:
            result = stacked(cls, vectors)
            self.stack = sum(t.numel() for t in result)
            return result

        Shards.stack = classmethod(stack)  # type: ignore[assignment]

    def counted(self, kind: str, owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def counting(*args: Any, **kwargs: Any) -> Any:
            self.now[kind] += 1
            return original(*args, **kwargs)

        setattr(owner, name, counting)

    def look(self, watch: Any, state: Any) -> None:
        if state.global_step == 1:
            self.at_first = dict(self.now)
            self.found["entries"] = 0
        since = {kind: count - self.at_first[kind] for kind, count in self.now.items()}
        self.found |= since | {"steps": state.global_step - 1}
        kept = [v for method in watch.trainer.methods for v in vars(method).values() if isinstance(v, Shards)]
        held = sum(t.numel() for vector in kept for t in vector) + self.stack
        self.found["entries"] = max(self.found["entries"], held)


if __name__ == "__main__":
    torch.set_num_threads(1)
    counts = Count() if sys.argv[2:] == ["count"] else None
    if sys.argv[2:3] == ["kill"]:
        kill(*map(int, sys.argv[3:]))
    if sys.argv[2:3] == ["copy"]:
        copy(int(sys.argv[3]))
    for config in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        output = Path(config["output"])
        if (output / "report.html").exists():
            continue
        try:
            run(config, Progress(quiet=True))
        except Exception:
            if sys.argv[2:3] != ["kill"]:  # what the others say of a peer that was killed is no error of theirs
                (output / "error.txt").write_text(traceback.format_exc())
            os._exit(1)  # others may wait for this process: the launcher ends them
        if counts is not None and Process.this().main:
            write_json(output / "counts.json", counts.found)
