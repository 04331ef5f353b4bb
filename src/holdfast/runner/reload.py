"""Find a stage of a run, finished or not, and load its model again."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from holdfast.api.tuner import Tuner
from holdfast.config.run import RunConfig, load_config
from holdfast.errors import ConfigError, RunDirectoryError
from holdfast.records.inputs import Inputs, data_changes, input_changes, listed
from holdfast.records.read import FinishedRun, read_run
from holdfast.records.shapes import read_json
from holdfast.records.stages import stage_number
from holdfast.records.trust import require_trust
from holdfast.runner.inputs import run_inputs
from holdfast.runner.setup import Setup
from holdfast.system.manifest import check
from holdfast.training.method_state import load_states

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

logger = logging.getLogger("holdfast")


@dataclass(frozen=True)
class StoredStage:
    """A complete stage of a run.

    Attributes:
        number: from 1; 0 is before training.
        folder: the stage's.
        config: the run's, with the base model where it lies now.
    """

    run: FinishedRun
    number: int
    folder: Path
    config: RunConfig

    @property
    def row(self) -> int:
        """The row of the score matrix that was measured after it."""
        return len(self.run.tasks) if self.run.joint and self.number else self.number

    @property
    def weights(self) -> str:
        """A digest of the trained weights."""
        return read_json(self.folder / "stage.json")["weights"] if self.number else "before training"

    def check_data(self, setup: Setup, *, through_endpoint: bool = False, accept_changes: bool = False) -> None:
        """Check that the stream and all else that the numbers depend on is what the run was measured with.

        Args:
            through_endpoint: the model is not the run's.
            accept_changes: warn instead.

        Raises:
            RunDirectoryError: something has changed.
        """
        inputs = run_inputs(setup)
        if through_endpoint:
            del inputs["model"]
        check_inputs(self.run, inputs, data_changes(self.run.info, setup.facts(), "tasks"), accept_changes)

    def model(self, config: RunConfig, tuner: Tuner) -> PreTrainedModel | PeftModel:
        """The model with its tuner and the stage's weights, on this machine's device.

        Raises:
            RunDirectoryError: a file of the weights is damaged.
        """
        from holdfast.runner.load import load_pretrained, load_weights

        model = load_pretrained(config, tuner)
        if self.number:
            check(self.folder / tuner.folder)
            load_weights(tuner, model, self.folder)
        return model

    def measured_model(self, setup: Setup) -> PreTrainedModel | PeftModel:
        """The model, with the methods' states of the stage, as the run measured it."""
        model = self.model(setup.config, setup.tuner)
        if self.number:
            load_states(setup.applied, self.folder / "method", model)
        return model


def check_inputs(run: FinishedRun, inputs: Inputs, lines: list[str], accept_changes: bool) -> None:
    """Compare inputs with those that a run began with.

    Args:
        lines: what else has changed.
        accept_changes: warn instead of raising.

    Raises:
        RunDirectoryError: something has changed.
    """
    lines = lines + input_changes(run.info.get("inputs", {}), inputs)
    if not lines:
        return
    if not accept_changes:
        raise RunDirectoryError(
            f"{run.path}: changed since this run began:{listed(lines)}\n"
            "put the old ones back, or go on all the same with --accept-changes"
        )
    logger.warning("%s: goes on with what changed since this run began:%s", run.path, listed(lines))


def find_stage(path: Path, number: int | None = None, *, trust: bool = False, measures: bool = False) -> StoredStage:
    """Find a complete stage of a run.

    Args:
        path: a run's directory.
        number: from 1, or 0 for the model before training; None: the stage whose weights the run holds.
        trust: run the code that its record names; see :func:`require_trust`.
        measures: it is to be measured.

    Raises:
        RunDirectoryError: there is no run, or none that was measured.
        ConfigError: there is no such stage, the run's base model is not found, or its code is not trusted.
    """
    run = read_run(path)
    number = stage_number(run, number)
    config = load_config(run.config)
    require_trust(path, config, trust, measures=measures)
    base = find_base(run, config.model.name, needed=True)
    model = config.model.model_copy(update={"name": base})
    here = config.model_copy(update={"model": model, "output": str(path)})  # paths may begin with {run}
    return StoredStage(run, number, run.folders[number], here)


def find_base(run: FinishedRun, name: str, needed: bool) -> str:
    """Find the base model of a run: a hub name, or a folder, which is looked for first from the run and then from here.

    Returns:
        The hub name, or the absolute path of the folder.

    Raises:
        ConfigError: it is needed, was a folder when the run began, and is in neither place.
    """
    recorded = run.info.get("model_folder")
    places = [Path(name)] if recorded is None else [run.path.resolve() / recorded, Path(name)]
    places = [place.resolve() for place in places]
    folder = next((place for place in places if place.exists()), None)
    if folder is None and recorded is not None:
        folder = places[0]
        if needed:
            raise ConfigError(
                f"model.name: the run began with the folder {name!r}, which is neither at {places[0]}, where it lay as "
                f"seen from the run, nor at {places[1]}; put it there, or call export where {name!r} leads to it"
            )
    return name if folder is None else str(folder)
