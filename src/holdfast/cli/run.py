"""`holdfast run`: a whole continual run from one configuration file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

Config = Annotated[Path, typer.Argument(help="The run's configuration, a YAML file.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="Changes to it, for example training.epochs=3.", metavar="[KEY.PATH=VALUE]..."),
]


class HelpWithKeys(TyperCommand):
    """Adds every key of the configuration to --help; they are only looked up when help is asked for."""

    def configuration(self) -> type[Any]:
        """The configuration's class."""
        from holdfast.config import RunConfig

        return RunConfig

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the usual help and then the keys."""
        from holdfast.config import describe

        super().format_help(ctx, formatter)
        formatter.write("\nKeys of the configuration (default):\n")
        for key, default, text in describe(self.configuration()):
            formatter.write(f"  {key}{f' ({default})' if default else ''}\n      {text}\n")


def run(config: Config, overrides: Overrides = None) -> None:
    """Learn every task of a stream in turn and measure all of them after each.

    The same command continues a run that was stopped or killed, and ends with the same numbers.
    """
    from rich.console import Console

    from holdfast.config import load_config
    from holdfast.quiet import quieten

    resolved = load_config(config, overrides)
    quieten()
    from holdfast.cli.table import print_table
    from holdfast.runner import run as run_stages

    run_stages(resolved)
    print_table([Path(resolved.output)], Console())
