"""`holdfast sweep`: many runs from one file, on this machine or on a cluster, and their comparison."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from holdfast.cli.run import HelpWithKeys
from holdfast.system.terminal import open_console, say

if TYPE_CHECKING:
    from rich.console import Console

    from holdfast.config.section import Section
    from holdfast.sweep.plan import PlannedRun
    from holdfast.sweep.work import RunOutcome

SweepFile = Annotated[Path, typer.Argument(help="The sweep, a YAML file.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="Changes to it, for example run.training.epochs=3.", metavar="[KEY.PATH=VALUE]..."),
]


class HelpWithSweepKeys(HelpWithKeys):
    """Adds every key of a sweep to --help."""

    def configuration(self) -> type[Section]:
        from holdfast.sweep.plan import Sweep

        return Sweep


def sweep(
    config: SweepFile,
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check every run, and list them.")] = False,
    processes: Annotated[
        int | None,
        typer.Option(
            "--processes", min=1, help="Runs at work at the same time.", show_default="the GPUs, or the cores"
        ),
    ] = None,
    ray: Annotated[
        str | None, typer.Option("--ray", help="Address of a Ray cluster to run on, or auto.", show_default="here")
    ] = None,
) -> None:
    """Check every run of a grid, do those that are not done, and compare all of them.

    The same command continues a sweep that was stopped or killed. A run that fails does not stop the others; the exit
    code is that of the runs that failed.
    """

    from holdfast.report.published import read_published
    from holdfast.sweep.plan import check, expand, load_sweep
    from holdfast.system.progress import Progress
    from holdfast.system.quiet import deduplicate_warnings, silence_libraries

    loaded = load_sweep(config, overrides)
    silence_libraries()
    deduplicate_warnings()
    runs = expand(loaded)
    check(runs)
    published = read_published(Path(loaded.published)) if loaded.published else []
    console = open_console(highlight=False)
    if dry_run:
        print_runs(runs, console)
        return
    from holdfast.sweep.ray_pool import RayPool
    from holdfast.sweep.search import searched
    from holdfast.sweep.work import exit_code, finish, local_workers, work_off

    need = loaded.resources
    with local_workers(need, processes) if ray is None else RayPool(need, ray) as workers:
        if loaded.search is not None:
            runs = searched(loaded, workers, Progress())
        ended = work_off(runs, workers, Progress())
    if report := finish(ended, Path(loaded.output)):
        from holdfast.report.published import beside_published
        from holdfast.report.terminal import print_comparison, print_published

        print_comparison(report.comparison, console)
        if published:
            print_published(beside_published(report.runs, published), console)
        say(report.page)
    if any(end.why for end in ended):
        print_failures(ended, console)
    raise typer.Exit(exit_code(ended))


def print_runs(runs: list[PlannedRun], console: Console) -> None:
    """List the runs of a sweep, and which are done."""
    states = [run.state for run in runs]
    for run, state in zip(runs, states, strict=True):
        console.print(f"{state:6}{run.name}", markup=False, soft_wrap=True)
    console.print(f"{len(runs)} runs, {states.count('done')} done, {states.count('begun')} begun")


def print_failures(ended: list[RunOutcome], console: Console) -> None:
    """List the runs that are not done, each with the reason."""
    from rich import box
    from rich.table import Table

    table = Table("run", "state", "exit", "why", box=box.SIMPLE_HEAD, pad_edge=False)
    for end in ended:
        if end.why:
            table.add_row(end.run.name, end.state, str(end.code), end.why)
    console.print(table)
