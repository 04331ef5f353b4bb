"""A stage of a finished or unfinished run, found and loaded again as it was measured."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from holdfast import tuners
from holdfast.config.run import RunConfig, load_config
from holdfast.errors import ConfigError, RunDirectoryError
from holdfast.records.directory import current_stage
from holdfast.records.read import FinishedRun, read_run
from holdfast.runner.setup import Setup
from holdfast.system.files import read_json
from holdfast.training.method_state import load_states


@dataclass(frozen=True)
class StoredStage:
    """A stage that is complete.

    Attributes:
        number: from 1; 0 is before training.
        folder: the stage's.
        config: the run's, with its base model where that lies now.
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
        """Which weights they are: a digest of those that were trained."""
        return read_json(self.folder / "stage.json")["weights"] if self.number else "before training"

    def check_data(self, setup: Setup) -> None:
        """RunDirectoryError if the stream is another one than the run was measured on."""
        facts, info = setup.facts(), self.run.info
        changed = [f"task {name!r}" for name, task in facts["tasks"].items() if _print(task) != _print(info, name)]
        if facts["stream"] != info["stream"]:
            changed.append("the stream's prompts or metrics")
        if changed:
            raise RunDirectoryError(f"{self.run.path}: changed since this run began: {', '.join(changed)}")

    def model(self, config: RunConfig, tuner: tuners.Tuner) -> Any:
        """The model with its tuner and the stage's weights, on this machine's device."""
        from holdfast.runner.load import load_pretrained

        model = load_pretrained(config, tuner)
        if self.number:
            tuner.load(model, self.folder / tuner.folder)
        return model

    def measured_model(self, setup: Setup) -> Any:
        """The same with what the methods remember, to be measured as the run did."""
        model = self.model(setup.config, setup.tuner)
        if self.number:
            load_states(setup.applied, self.folder / "method", model)
        return model


def find_stage(path: Path, number: int | None = None) -> StoredStage:
    """A complete stage of a run.

    Args:
        path: a run's directory.
        number: from 1, or 0 for the model before training; where absent, the one whose weights the run holds.

    Raises:
        RunDirectoryError: there is no run, or nothing of it was measured yet.
        ConfigError: there is no such stage, or the run's base model is not found.
    """
    run = read_run(path)
    done = [n for n, folder in run.folders.items() if n == 0 or (folder / "stage.json").exists()]
    if number is None:
        number = current_stage(run.info, max(done))
    if number not in done:
        raise ConfigError(
            f"--stage: {number} is no complete stage of {path}; complete, with 0 for before training: "
            + ", ".join(map(str, done))
        )
    config = load_config(run.config)
    base = find_base(run, config.model.name, needed=True)
    model = config.model.model_copy(update={"name": base})
    return StoredStage(run, number, run.folders[number], config.model_copy(update={"model": model}))


def _print(task: dict[str, Any], name: str | None = None) -> str | None:
    """The fingerprint of a task's data, from its facts, or by its name from run.json."""
    return (task if name is None else task["tasks"].get(name, {})).get("fingerprint")


def find_base(run: FinishedRun, name: str, needed: bool) -> str:
    """The base model: a hub name, or its folder as an absolute path, looked for from the run, and then from here.

    Raises:
        ConfigError: it is needed, was a folder when the run began, and is in neither place.
    """
    recorded = run.info.get("model_folder")
    places = [Path(name)] if recorded is None else [run.path.resolve() / recorded, Path(name)]
    places = [place.resolve() for place in places]
    there = next((place for place in places if place.is_dir()), None)
    if there is None and recorded is not None:
        there = places[0]
        if needed:
            raise ConfigError(
                f"model.name: the run began with the folder {name!r}, which is neither at {places[0]}, where it lay as "
                f"seen from the run, nor at {places[1]}; put it there, or call export where {name!r} leads to it"
            )
    return name if there is None else str(there)
