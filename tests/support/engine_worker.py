"""Does jobs one after another in processes that train together; the tests of engines start it (see engine_jobs.py).

usage: engine_worker.py JOBS.json

JOBS.json is a list of jobs: {"config": a configuration, and beside it, if wanted:
"of": the folder of another run, a copy of which goes on; "copy": after that step of the last stage leave in
OUTPUT-copy what lies on the disk; "kill": [stage, step], the last process dies by SIGKILL after it;
"break": what the engine does wrong, a name in BREAK; "count": leave counts.json beside the results}.
counts.json has the last stage's steps, how many sums over processes it asked for, how many divided tensors were made
whole between its first and its last step, and how many entries of vectors its methods held in this process at most.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from holdfast.engines.process import Process
from holdfast.engines.shards import Shards
from holdfast.engines.zero.layout import Partitioned
from holdfast.engines.zero.parts import Part
from holdfast.runner.run import run
from holdfast.runner.stage import StageWatch
from holdfast.system.files import write_json
from holdfast.system.launch import tell_launcher
from holdfast.system.progress import Progress
from holdfast.training import engine_mixin

Look = Callable[[StageWatch, Any], None]
"""Called with the watching callback and the trainer's state after each step."""


@contextmanager
def looking(look: Look) -> Iterator[None]:
    original = StageWatch.on_step_end

    def on_step_end(self: StageWatch, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        original(self, args, state, control, **kwargs)
        look(self, state)

    with patch.object(StageWatch, "on_step_end", on_step_end):
        yield


def killing(stage: int, step: int) -> Look:
    def look(watch: StageWatch, state: Any) -> None:
        process = Process.this()
        if (watch.stage.index, state.global_step) == (stage, step) and process.rank == process.world - 1:
            os.kill(os.getpid(), signal.SIGKILL)

    return look


def copying(step: int) -> Look:
    def look(watch: StageWatch, state: Any) -> None:
        output = Path(watch.trainer.args.output_dir).parents[2]
        if state.global_step == step and Process.this().main:
            copy = output.with_name(f"{output.name}-copy")
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(output, copy)

    return look


class Count:
    """Sums over processes and vectors held, of the stage that trains."""

    def __init__(self, stack: ExitStack) -> None:
        self.found = {"steps": 0, "sums": 0, "gathers": 0, "entries": 0}
        self.now = {"sums": 0, "gathers": 0}
        self.at_first = dict(self.now)
        self.stack = 0
        stack.enter_context(looking(self.look))
        for owner, name in ((Process, "all_reduce_sum"), (Shards, "all_reduce_")):
            stack.enter_context(self.counted("sums", owner, name))
        for owner, name in ((Partitioned, "full"), (Part, "join"), (DTensor, "full_tensor")):
            stack.enter_context(self.counted("gathers", owner, name))
        stacked = Shards.stack.__func__  # type: ignore[attr-defined]

        def stack_of(cls: Any, vectors: Any) -> Shards:
            result = stacked(cls, vectors)
            self.stack = sum(t.numel() for t in result)
            return result

        stack.enter_context(patch.object(Shards, "stack", classmethod(stack_of)))

    def counted(self, kind: str, owner: Any, name: str) -> Any:
        original = getattr(owner, name)

        def counting(*args: Any, **kwargs: Any) -> Any:
            self.now[kind] += 1
            return original(*args, **kwargs)

        return patch.object(owner, name, counting)

    def look(self, watch: StageWatch, state: Any) -> None:
        if state.global_step == 1:
            self.at_first = dict(self.now)
            self.found["entries"] = 0
        since = {kind: count - self.at_first[kind] for kind, count in self.now.items()}
        self.found |= since | {"steps": state.global_step - 1}
        kept = [v for method in watch.trainer.methods for v in vars(method).values() if isinstance(v, Shards)]
        held = sum(t.numel() for vector in kept for t in vector) + self.stack
        self.found["entries"] = max(self.found["entries"], held)


@contextmanager
def reducing(reduce: Callable[[torch.Tensor], Any]) -> Iterator[None]:
    """DDP does this with its gradients, instead of taking their mean over the processes."""
    original = DistributedDataParallel.__init__

    def hook(state, bucket):  # DDP does not know annotations that are strings
        reduce(bucket.buffer())
        future: torch.futures.Future[torch.Tensor] = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    def init(self: DistributedDataParallel, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        self.register_comm_hook(None, hook)

    with patch.object(DistributedDataParallel, "__init__", init):
        yield


BREAK: dict[str, Callable[[], Any]] = {
    "gradients are not averaged": lambda: reducing(lambda gradient: None),
    "gradients are summed": lambda: reducing(torch.distributed.all_reduce),
    "moments are lost": lambda: patch.object(engine_mixin, "load_optimizer", lambda *args: None),
}
"""Faults of an engine that the comparison of the table must see."""


def work(job: dict[str, Any]) -> None:
    output, process = Path(job["config"]["output"]), Process.this()
    if "of" in job and process.main:
        shutil.copytree(job["of"], output)
    process.wait()
    with ExitStack() as stack:
        counts = Count(stack) if "count" in job else None
        if "copy" in job:
            stack.enter_context(looking(copying(job["copy"])))
        if "kill" in job:
            stack.enter_context(looking(killing(*job["kill"])))
        if "break" in job:
            stack.enter_context(BREAK[job["break"]]())
        run(job["config"], Progress(quiet=True))
    if counts is not None and process.main:
        write_json(output / "counts.json", counts.found)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for job in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        try:
            work(job)
        except Exception as error:
            tell_launcher(error)
            os._exit(1)  # others may wait for this process: the launcher ends them
        gc.collect()
        gc.freeze()  # what was imported is never collected again, which would take longer than a run
    os._exit(0)  # DeepSpeed's engines have nothing to say at exit
