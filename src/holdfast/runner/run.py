"""`run`: what is wrong with a configuration, its directory or its data is told before torch is imported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from holdfast.config.run import RunConfig, load_config
from holdfast.models.pretrained import check_model_files
from holdfast.records.directory import LEARN, RunDirectory, open_directory
from holdfast.runner.begun import as_begun
from holdfast.runner.data import RunData, load_data
from holdfast.runner.names import check_names
from holdfast.system.collection import no_collection
from holdfast.system.interrupt import Interrupt
from holdfast.system.progress import Progress


def run(
    config: RunConfig | dict[str, Any] | str | Path,
    progress: Progress | None = None,
    *,
    accept_changes: bool = False,
    backfill: bool = False,
) -> dict[str, Any]:
    """Train on every task of the stream in turn and measure all tasks after each; continue a run that was stopped, or
    whose stream has grown.

    Args:
        config: a configuration, or the mapping or YAML file that :func:`holdfast.load_config` reads.
        progress: shows the progress; None: on standard error.
        accept_changes: continue although data, model, tokenizer, texts or code are no longer those that the run began
            with; the numbers before and after cannot be compared.
        backfill: also measure appended tasks after the stages before them, whose weights are loaded again.

    Returns:
        The content of matrix.json.

    Raises:
        UserError: the configuration, the data or the directory cannot be used, or a loss is not finite.
        GateFailed: a stage failed the configuration's gate, whose ``on_fail`` is ``stop``.
        Interrupted: SIGINT or SIGTERM asked the run to stop; the same call continues it.
    """
    if not isinstance(config, RunConfig):
        config = load_config(config)
    with open_directory(Path(config.output)) as directory, Interrupt() as interrupt:
        data = load_early(config, directory)
        with no_collection():
            from holdfast.runner.loop import run_in  # torch comes with it
        return run_in(
            directory, interrupt, config, progress, accept_changes=accept_changes, backfill=backfill, data=data
        )


def load_early(config: RunConfig, directory: RunDirectory) -> RunData | None:
    """The data of a run, where they are to be read from the files that its configuration names; None: elsewhere.

    Raises:
        UserError: as :func:`load_data`; a name is unknown, or there is no such model.
    """
    if (directory.path / LEARN).exists():
        return None
    config = as_begun(config, directory.record)
    check_names(config)
    check_model_files(config.model)
    return load_data(config)
