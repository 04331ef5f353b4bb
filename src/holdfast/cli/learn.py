"""`holdfast learn`: teach a run new data; it grows task by task."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from holdfast.cli.run import AcceptChanges, Processes, Restarts
from holdfast.cli.run import HelpWithKeys as HelpWithKeysOfARun
from holdfast.errors import ConfigError
from holdfast.system.collection import no_collection
from holdfast.system.terminal import open_console

__all__ = ["HelpWithKeys", "learn"]


TAKEN = ("task.name", "task.path", "task.dataset")
"""Of a task, what DATA and --name say."""


class HelpWithKeys(HelpWithKeysOfARun):
    """Adds the keys that learn takes to --help."""

    title = "Keys, with the defaults of a run; learn settles others by itself (docs/learn.md):"

    def described_keys(self) -> list[tuple[str, str, str]]:
        """Those of a run, with ``task`` in the place of its stream."""
        rows = [
            (key.replace("stream.tasks.", "task."), default, text) for key, default, text in super().described_keys()
        ]
        return [row for row in rows if row[0].partition(".")[0] not in ("stream", "output") and row[0] not in TAKEN]


class Memory(StrEnum):
    """What a run keeps of the rows that it is given."""

    rows = "rows"
    none = "none"


Data = Annotated[
    str,
    typer.Argument(
        help="A data file, a folder of data files, or a Hugging Face dataset.", show_default=False, metavar="DATA"
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="Settings, for example training.epochs=3.", metavar="[KEY.PATH=VALUE]..."),
]
Into = Annotated[Path, typer.Option("--into", help="The run's directory; the first call makes it.", show_default=False)]
Model = Annotated[
    str | None, typer.Option("--model", help="Folder or hub name; the first call needs it.", show_default=False)
]
Name = Annotated[str | None, typer.Option("--name", help="What the task is called.", show_default="as DATA is")]
Metric = Annotated[
    str | None, typer.Option("--metric", help="How the task is scored.", show_default="by what its answers are")
]
KeptRows = Annotated[
    Memory | None,
    typer.Option(
        "--memory",
        help="rows: keep DATA's rows in the directory; none: keep no row on disk, only hashes.",
        show_default="rows",
    ),
]
Config = Annotated[
    Path | None, typer.Option("--config", help="Settings, a YAML file with keys of a run.", show_default=False)
]


def learn(
    data: Data,
    into: Into,
    overrides: Overrides = None,
    model: Model = None,
    name: Name = None,
    metric: Metric = None,
    memory: KeptRows = None,
    config: Config = None,
    processes: Processes = 1,
    max_restarts: Restarts = 0,
    accept_changes: AcceptChanges = False,
) -> None:
    """Learn DATA into a run, and measure what that taught and what it cost.

    The same command continues a call that was stopped or killed. Data that the run has learned are known again, and
    nothing is trained. Exit code 3: the stage failed the configuration's gate.
    """
    from holdfast.system.launch import launch, launched
    from holdfast.system.quiet import silence_libraries

    if processes > 1 or max_restarts:
        if launched():
            raise ConfigError("--processes: a launcher (torchrun, accelerate, deepspeed) has started these processes")
        options = {"--into": into, "--model": model, "--name": name, "--metric": metric}
        options |= {"--memory": memory and memory.value, "--config": config}
        given = [part for key, value in options.items() if value is not None for part in (key, str(value))]
        flags = ["--accept-changes"] * accept_changes
        launch(["learn", data, *(overrides or []), *given, *flags], processes, max_restarts)
        return
    silence_libraries()
    with no_collection():
        from holdfast.records.gate import raise_if_failed
        from holdfast.report.learned import finished_at, print_learned
        from holdfast.runner.learn.learn import learn as learn_data

    before = finished_at(into)
    learn_data(
        data,
        into,
        model,
        name=name,
        metric=metric,
        memory=None if memory is None else memory.value,
        config=config,
        overrides=overrides,
        accept_changes=accept_changes,
    )
    if before is None or finished_at(into) != before:  # something was learned
        print_learned(into, open_console(highlight=False))
        raise_if_failed(into, newest=True)
