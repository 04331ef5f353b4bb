"""`holdfast run`: all stages of a run, from one configuration file."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from holdfast.cli.watch import NoBrowser, Port, beside
from holdfast.errors import ConfigError
from holdfast.system.collection import no_collection
from holdfast.system.terminal import open_console

if TYPE_CHECKING:
    from holdfast.config.run import RunConfig
    from holdfast.config.section import Section

WATCH_EVERY = 50
"""Steps between the measurements of --watch-general, unless evaluation.watch_general is given."""

Config = Annotated[Path, typer.Argument(help="The run's configuration, a YAML file.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="Changes to it, for example training.epochs=3.", metavar="[KEY.PATH=VALUE]..."),
]


class HelpWithKeys(TyperCommand):
    """Adds every key of the configuration to --help."""

    def configuration(self) -> type[Section]:
        """The configuration's class."""
        from holdfast.config.run import RunConfig

        return RunConfig

    title = "Keys of the configuration (default):"

    def described_keys(self) -> list[tuple[str, str, str]]:
        """Each key, its default, and what it is."""
        from holdfast.config.describe import describe

        return describe(self.configuration())

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the usual help and then the keys."""
        super().format_help(ctx, formatter)
        formatter.write(f"\n{self.title}\n")
        for key, default, text in self.described_keys():
            formatter.write(f"  {key}{f' ({default})' if default else ''}\n      {text}\n")


WatchGeneral = Annotated[
    bool, typer.Option("--watch-general", help="Show the loss on general text while a stage trains.")
]


Processes = Annotated[int, typer.Option("--processes", min=1, help="Processes on this machine that train together.")]
Restarts = Annotated[
    int, typer.Option("--max-restarts", min=0, help="How often to go on from the last checkpoint where one died.")
]


AcceptChanges = Annotated[
    bool,
    typer.Option("--accept-changes", help="Go on although data, model, tokenizer, texts or code have changed."),
]


Trust = Annotated[
    bool,
    typer.Option("--trust", help="Run the code that the run's own configuration names, by whomever it is."),
]


Backfill = Annotated[
    bool,
    typer.Option("--backfill", help="Also measure appended tasks after the stages before them."),
]


Open = Annotated[bool, typer.Option("--open", help="Show the run in the browser while it trains.")]


def run(
    config: Config,
    overrides: Overrides = None,
    watch_general: WatchGeneral = False,
    processes: Processes = 1,
    max_restarts: Restarts = 0,
    accept_changes: AcceptChanges = False,
    backfill: Backfill = False,
    open_page: Open = False,
    port: Port = 0,
    no_browser: NoBrowser = False,
) -> None:
    """Learn every task of a stream in turn, and measure all tasks after each.

    The same command continues a run that was stopped or killed, and ends with the same numbers. It also continues a
    finished run to whose stream tasks were appended. Exit code 3: a stage failed the configuration's gate.
    """

    from holdfast.config.run import load_config
    from holdfast.runner.names import check_names

    if (port or no_browser) and not open_page:
        raise ConfigError("--port, --no-browser: are for --open")
    resolved = load_config(config, overrides)
    check_names(resolved)
    shown = open_page and os.environ.get("RANK", "0") == "0"  # by one of several processes
    with beside(resolved.output, port, no_browser) if shown else contextlib.nullcontext():
        _run(config, resolved, overrides or [], watch_general, processes, max_restarts, accept_changes, backfill)


def _run(
    config: Path,
    resolved: RunConfig,
    overrides: list[str],
    watch_general: bool,
    processes: int,
    max_restarts: int,
    accept_changes: bool,
    backfill: bool,
) -> None:
    """Run in this process, or launch several."""
    from holdfast.system.launch import launch, launched
    from holdfast.system.quiet import silence_libraries

    if processes > 1 or max_restarts:
        if launched():
            raise ConfigError("--processes: a launcher (torchrun, accelerate, deepspeed) has started these processes")
        flags = ["--watch-general"] * watch_general + ["--accept-changes"] * accept_changes
        flags += ["--backfill"] * backfill
        launch(["run", str(config), *overrides, *flags], processes, max_restarts)
        return
    if watch_general and resolved.evaluation.watch_general is None:
        resolved.evaluation.watch_general = WATCH_EVERY
    silence_libraries()
    with no_collection():
        from holdfast.engines.process import Process
        from holdfast.records.gate import raise_if_failed
        from holdfast.report.terminal import print_table
        from holdfast.runner.run import run as run_stages

    run_stages(resolved, accept_changes=accept_changes, backfill=backfill)
    if Process.this().main:
        print_table([Path(resolved.output)], open_console())
    raise_if_failed(Path(resolved.output))
