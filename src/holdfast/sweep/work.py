"""Do the runs of a sweep, on this machine or on a cluster, and report how each ended."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from filelock import FileLock, Timeout

from holdfast.config.run import load_config
from holdfast.errors import ConfigError, GateFailed, Interrupted, UserError
from holdfast.sweep.plan import PlannedRun, Resources, is_done
from holdfast.system.files import write_json, write_text
from holdfast.system.interrupt import Interrupt
from holdfast.system.machine import cores
from holdfast.system.pool import JobOutcome, Pool
from holdfast.system.progress import Progress

if TYPE_CHECKING:
    from holdfast.records.read import FinishedRun
    from holdfast.report.compare import Comparison


class Workers(Protocol):
    """Does runs: :class:`holdfast.system.pool.Pool`, or :class:`holdfast.sweep.ray_pool.RayPool`."""

    @property
    def free(self) -> int: ...

    @property
    def working(self) -> int: ...

    def submit(self, key: PlannedRun, config: dict[str, Any], /) -> None: ...

    def wait(self, seconds: float | None = None) -> list[tuple[PlannedRun, JobOutcome]]: ...

    def stop(self) -> None: ...


class InUseError(RuntimeError):
    """Another sweep is doing this run; other runs may be done first."""


PATIENCE = 5.0
"""Seconds to wait for a run that another sweep is doing, before others are tried."""


@dataclass(frozen=True)
class RunOutcome:
    """How a run ended.

    Attributes:
        state: done, skipped (it was done before), stopped or failed.
        why: the reason, if it is not done.
        code: the exit code of ``holdfast run``.
    """

    run: PlannedRun
    state: str
    why: str = ""
    code: int = 0


def work_off(runs: Sequence[PlannedRun], workers: Workers, progress: Progress) -> list[RunOutcome]:
    """Do the runs that are not done; a run that fails does not stop the others.

    Args:
        workers: call :func:`do_run`.

    Returns:
        The outcome of each, in order.

    Raises:
        Interrupted: SIGINT or SIGTERM asked to stop; the same call continues.
    """
    ended = {run.name: RunOutcome(run, "skipped") for run in runs if run.state == "done"}
    left = [run for run in runs if run.name not in ended]
    if ended:
        progress.line(f"{len(ended)} of {len(runs)} runs are done already")
    stopping = False
    with Interrupt() as interrupt:
        while (left and not stopping) or workers.working:
            while left and workers.free and not stopping:
                run = left.pop(0)
                workers.submit(run, run.config.model_dump(mode="json"))
            for run, outcome in workers.wait(0.5):
                if isinstance(outcome.error, InUseError):
                    left.append(run)
                    continue
                ended[run.name] = run_outcome(run, outcome)
                progress.line(f"{len(ended)}/{len(runs)} {run.name}: {in_a_line(ended[run.name])}")
            if interrupt.requested and not stopping:
                stopping = True
                progress.line(f"stopping {workers.working} runs at a checkpoint")
                workers.stop()
    if stopping:
        done = sum(end.state in ("done", "skipped") for end in ended.values())
        raise Interrupted(f"stopped with {done} of {len(runs)} runs done; the others go on from their checkpoints")
    return [ended[run.name] for run in runs]


def run_outcome(run: PlannedRun, outcome: JobOutcome) -> RunOutcome:
    """The outcome of a run, from that of its job."""
    match outcome.error:
        case None:
            return RunOutcome(run, "done")
        case Interrupted() as error:
            return RunOutcome(run, "stopped", str(error), 1)
        case UserError() | GateFailed() as error:
            return RunOutcome(run, "failed", str(error), error.exit_code)
        case error:
            return RunOutcome(run, "failed", f"{type(error).__name__}: {error}", 1)


def in_a_line(end: RunOutcome) -> str:
    """The outcome of a run, in a line."""
    return f"{end.state}: {end.why.splitlines()[0]}" if end.why else end.state


def exit_code(ended: Sequence[RunOutcome]) -> int:
    """The exit code of a sweep: that of the runs that failed, or 1 if these differ."""
    codes = {end.code for end in ended if end.code}
    return codes.pop() if len(codes) == 1 else int(bool(codes))


def do_run(processes: int, config: dict[str, Any]) -> None:
    """Do one run, in this process or in several.

    Raises:
        InUseError: another sweep is doing it.
    """
    output = Path(config["output"])
    output.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as locks:
        try:
            locks.enter_context(FileLock(output.with_name(f".{output.name}.lock")).acquire(timeout=PATIENCE))
        except Timeout:
            raise InUseError(f"{output}: another sweep is at it") from None
        if (output / "run.json").exists() and is_done(load_config(config), output):
            return
        if processes > 1:
            from holdfast.system.launch import launch

            path = output.with_name(f".{output.name}.json")
            write_json(path, config)
            launch(["run", str(path)], processes, quiet=True)
            return
        import torch

        from holdfast.runner.run import run
        from holdfast.system.quiet import deduplicate_warnings, silence_libraries

        silence_libraries()
        deduplicate_warnings()
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
        run(config, Progress(quiet=True))


def local_workers(resources: Resources, count: int | None) -> Pool[PlannedRun]:
    """Workers on this machine, each with GPUs of its own if there are any, and a share of the cores.

    Args:
        count: runs at work at the same time; None: as many as the GPUs, or without GPUs the cores, are enough for.

    Raises:
        ConfigError: there are GPUs, but too few for one run.
    """
    from holdfast.system.device import VISIBLE, device_type, gpu_count

    variable = VISIBLE.get(device_type())
    gpus = visible_gpus(gpu_count(), variable)
    processes = resources.processes
    shares = [gpus[i : i + processes] for i in range(0, len(gpus) - processes + 1, processes)]
    if gpus and not shares:
        raise ConfigError(f"resources.processes: {processes} processes need as many GPUs, and there are {len(gpus)}")
    count = count or len(shares) or max(1, cores() // processes)
    threads = os.environ.get("OMP_NUM_THREADS", str(max(1, cores() // (count * processes))))
    environments = [{"OMP_NUM_THREADS": threads} for _ in range(count)]
    for i, environment in enumerate(environments):
        if shares and variable:
            environment[variable] = ",".join(shares[i % len(shares)])
    return Pool(partial(do_run, processes), environments)


def visible_gpus(count: int, variable: str | None = "CUDA_VISIBLE_DEVICES") -> list[str]:
    """The GPUs of this process, named as in the variable that says which it sees."""
    names = os.environ.get(variable) if variable else None
    return names.split(",")[:count] if names else [str(i) for i in range(count)]


@dataclass(frozen=True)
class Report:
    """The runs of a sweep that are done, and their comparison.

    Attributes:
        page: the HTML file.
    """

    runs: list[FinishedRun]
    comparison: Comparison
    page: Path


def finish(ended: Sequence[RunOutcome], folder: Path) -> Report | None:
    """Write the outcome of each run (sweep.json) and, for the runs that are done, the table (table.md, table.csv) and
    the page.

    Returns:
        None if no run is done.
    """
    from holdfast.records.read import read_runs
    from holdfast.report import write_report
    from holdfast.report.compare import compare
    from holdfast.report.tables import as_csv, as_markdown

    rows = [{"run": end.run.name, "state": end.state, "why": end.why, "exit_code": end.code} for end in ended]
    write_json(folder / "sweep.json", rows)
    paths = [end.run.path for end in ended if end.state in ("done", "skipped")]
    if not paths:
        return None
    runs = read_runs(paths)
    comparison = compare(runs)
    write_text(folder / "table.md", as_markdown(comparison))
    write_text(folder / "table.csv", as_csv(comparison))
    return Report(runs, comparison, write_report(paths, folder / "report.html"))
