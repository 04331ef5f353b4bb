"""Carries out an experiment: its runs, in several processes, then its tables, figure and findings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock

from holdfast.config.run import load_config
from holdfast.config.section import Named
from holdfast.lab.experiment import DONE, Experiment, PlannedLabRun, expand, resolve
from holdfast.lab.findings import judge, markdown
from holdfast.lab.regression import RegressionConfig
from holdfast.lab.results import score_columns, tables
from holdfast.lab.sources import Files, data_of, digest
from holdfast.lab.tables import TableRow, read_table, write_table
from holdfast.system.files import write_json, write_text
from holdfast.system.pool import Pool
from holdfast.system.progress import Progress

RESULTS, CURVES = "results.csv", "curves.csv"


def run_experiment(
    experiment: Experiment,
    out: Path,
    *,
    cache: Path = Path("runs/lab"),
    seeds: Sequence[int] | None = None,
    processes: int = 2,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Do the runs that are not done yet, and write tables, figure and findings.

    Args:
        out: gets results.csv, curves.csv where the experiment says so, figure.pdf, figure.png, findings.json and
            findings.md.
        cache: folder of data and runs; experiments that use the same one share what they have in common.
        seeds: replace the experiment's. The tables have all runs that are done, of these seeds and of the experiment's.
        processes: number of runs at the same time, one thread each.
        progress: where to show progress; standard error where absent.

    Returns:
        the findings, as :func:`holdfast.lab.findings.judge` returns them.

    Raises:
        UserError: a configuration or source cannot be used.
        Interrupted: SIGINT or SIGTERM asked it to stop; the same call continues.
    """
    from holdfast.lab.figures import require_matplotlib

    require_matplotlib()
    progress = progress or Progress()
    curves: list[TableRow] = []
    if experiment.slices_of is not None:
        results = read_table(out.parents[2] / experiment.slices_of / "results" / out.name / RESULTS)
    elif experiment.regression is not None:
        results, curves = _regressions(experiment.regression, experiment.seeds if seeds is None else seeds, progress)
    else:
        data = data_of(experiment.data, "experiment")
        folder = cache / "data" / f"{experiment.data.name}-{digest(data.identity())}"
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock"):
            files = data.prepare(folder)
        wanted = expand(experiment, data, seeds)
        _work_off(wanted, experiment, files, cache, processes, progress)
        planned = {run.key: run for run in (*expand(experiment, data), *wanted)}
        results, curves = tables(experiment, [run for run in planned.values() if run.is_done(cache)], cache)
    write_table(out / RESULTS, results)
    if curves:
        write_table(out / CURVES, curves)
    return redraw(experiment, out)


def redraw(experiment: Experiment, out: Path) -> list[dict[str, Any]]:
    """Make figure and findings from the tables in ``out``.

    Raises:
        DataError: there is no table.
    """
    from holdfast.lab.figures import Tables, draw

    results = read_table(out / RESULTS)
    curves = read_table(out / CURVES) if (out / CURVES).exists() else []
    draw(experiment.figure, Tables(results, curves, experiment.old, experiment.new), out / "figure")
    findings = [judge(finding, results) for finding in experiment.findings]
    write_json(out / "findings.json", findings)
    write_text(out / "findings.md", markdown(findings))
    return findings


def _regressions(
    config: RegressionConfig, seeds: Sequence[int], progress: Progress
) -> tuple[list[TableRow], list[TableRow]]:
    import torch

    from holdfast.lab.regression import experiment

    torch.set_num_threads(1)
    results: list[TableRow] = []
    curves: list[TableRow] = []
    for seed in seeds:
        progress.line(f"regression, seed {seed}")
        rows, lines = experiment(config, seed)
        results += [{"seed": seed} | row for row in rows]
        if not curves:  # the figure shows one seed
            curves = [{"seed": seed} | line for line in lines]
    return results, curves


def _work_off(
    runs: list[PlannedLabRun], experiment: Experiment, files: Files, cache: Path, processes: int, progress: Progress
) -> None:
    """Do the runs that are not done, each after the one that it goes on from."""
    done = {run.key for run in runs if run.is_done(cache)}
    left = {run.key: run for run in runs if run.key not in done}
    count, before = len(left), len(done)

    def job(run: PlannedLabRun) -> tuple[Any, ...]:
        paths = {name: str(path) for name, path in files.items()}
        return run.command, resolve(run, files, cache), run.model(cache), experiment.data.model_dump(), paths

    def finished(run: PlannedLabRun, summary: str) -> None:
        done.add(run.key)
        progress.line(f"{len(done) - before}/{count} {run.name}: {summary}")

    ready = lambda run: run.parent is None or run.parent.key in done  # noqa: E731
    if processes == 1:
        while left:
            run = left.pop(next(key for key, run in left.items() if ready(run)))
            finished(run, _do(*job(run)))
        return
    with Pool[PlannedLabRun](_do, [{}] * processes) as pool:
        while left or pool.working:
            for key in [key for key, run in left.items() if ready(run)][: pool.free]:
                run = left.pop(key)
                pool.submit(run, *job(run))
            for run, outcome in pool.wait():
                finished(run, outcome.result())


def _do(command: str, config: dict[str, Any], model: Path, data: dict[str, Any], files: dict[str, str]) -> str:
    """Do one run, in one thread, and measure its model. A lock keeps other processes from doing the same run.

    Returns:
        a summary of its results, for people.
    """
    import torch

    from holdfast.lab.pretrain import pretrain
    from holdfast.runner.run import run
    from holdfast.system.quiet import silence_libraries

    silence_libraries()
    torch.set_num_threads(1)
    folder, quiet = Path(config["output"]), Progress(quiet=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if command == "run":
            columns = score_columns(run(load_config(config), quiet))
            summary = ", ".join(f"{name} {value:.3f}" for name, value in columns.items())
        else:
            result = pretrain(config, quiet)
            losses = ", ".join(f"{name} {at['loss']:.3f}" for name, at in result["end"]["domains"].items())
            summary = f"{losses} after {result['tokens']:,} tokens, {result['seconds']:.0f} s"
        if not (folder / DONE).exists():
            kind = data_of(Named(**data), "experiment")
            measured = kind.measures(model, {name: Path(path) for name, path in files.items()})
            write_json(folder / DONE, measured)
    return summary
