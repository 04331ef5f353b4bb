"""A stage that moved no weight is not measured: it has the results of the stage that it began with."""

from __future__ import annotations

from holdfast.evaluation.general import matrix_name
from holdfast.records.directory import RunDirectory, current_stage
from holdfast.records.shapes import read_jsonl
from holdfast.runner.due import Due
from holdfast.runner.measure import read_evaluated, responses_file
from holdfast.runner.plan import START, PlannedStage
from holdfast.runner.setup import Setup
from holdfast.system.manifest import noted_alike


def take_over(setup: Setup, directory: RunDirectory, stage: PlannedStage, of: Due) -> PlannedStage | None:
    """Write the results of the stage that a stage began with into its folder, if the model answers as it did then; all
    ranks call this.

    What is measured there already stays, and what the earlier stage was not measured by is left.

    Args:
        of: what is measured.

    Returns:
        the earlier stage, whose number ``same_as`` in evaluation.json keeps; None: the model may answer otherwise.
    """
    earlier = unmoved_since(setup, directory, stage)
    if earlier is None:
        return None
    source, folder = (directory.stage(one.index, one.name) for one in (earlier, stage))
    names = [task.name for task in setup.stream.tasks]
    files = [responses_file(source, task.name, names) for task in of.tasks if task.gone is None]
    files += directory.process.broadcast(sorted(source.glob("responses/general/*.jsonl"))) if of.general else []
    for file in files:
        place = folder / file.relative_to(source)
        if directory.exists(file) and not directory.exists(place):
            directory.write_jsonl(place, read_jsonl(file))
    found, evaluated = read_evaluated(directory, source), read_evaluated(directory, folder)
    wanted = {matrix_name(one) for one in of.general}
    for key in ("general", "general_examples", "general_chance", "general_responses"):
        if known := {name: value for name, value in found.get(key, {}).items() if name in wanted}:
            evaluated[key] = known | evaluated.get(key, {})
    directory.write_json(folder / "evaluation.json", evaluated | {"same_as": earlier.index})
    return earlier


def unmoved_since(setup: Setup, directory: RunDirectory, stage: PlannedStage) -> PlannedStage | None:
    """The stage that a stage began with, if it saved the very same weights, is measured, and no method acts at test
    time; all ranks call this."""
    earlier = [START, *setup.stages][current_stage(directory.record, max(stage.index - 1, 0))]
    if not earlier.index or any(method.acts_at_test for method in setup.applied):
        return None
    folders = [directory.stage(one.index, one.name) for one in (earlier, stage)]
    alike = noted_alike(directory.path, *(folder / setup.tuner.folder for folder in folders))
    measured = (folders[0] / "evaluation.json").exists()
    return earlier if directory.process.broadcast(alike and measured) else None
