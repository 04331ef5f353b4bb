"""`holdfast check`: a dry run that shows what a run would do, and trains nothing."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from holdfast.cli.run import Config, Overrides
from holdfast.errors import ConfigError
from holdfast.system.collection import no_collection
from holdfast.system.terminal import open_console

Measured = Annotated[
    bool, typer.Option("--general", help="Load the model and measure its general abilities, as before training.")
]


def check(config: Config, overrides: Overrides = None, general: Measured = False) -> None:
    """Resolve the configuration, load every task, and show one example a task, the plan and its cost.

    Of a sweep, check every run and list them, as `holdfast sweep --dry-run` does.
    """
    from holdfast.cli.sweep import sweep
    from holdfast.config.run import load_config
    from holdfast.sweep.plan import is_sweep

    if is_sweep(config):
        if general:
            raise ConfigError("--general measures the model of one run, and this is a sweep")
        sweep(config, overrides, dry_run=True)
        return
    from holdfast.records.directory import RunDirectory, check_free
    from holdfast.runner.run import load_early
    from holdfast.system.progress import Progress
    from holdfast.system.quiet import silence_libraries

    silence_libraries()
    resolved = load_config(config, overrides)
    output = Path(resolved.output)
    check_free(output)
    data = load_early(resolved, RunDirectory(output))
    with nullcontext() if general else no_collection():
        from holdfast.runner.check import print_check  # torch comes with it; names, files and rows have been checked

        print_check(resolved, open_console(highlight=False), data, Progress() if general else None)
