"""A run that `holdfast run` began goes on to learn: its tasks, its settings, and the side of each of its prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from holdfast.config.run import RunConfig, placed
from holdfast.config.stream import TaskConfig
from holdfast.data.given import GivenRow, hashes
from holdfast.data.load import find_source, load_stream
from holdfast.errors import RunDirectoryError
from holdfast.records.kept import Kept


def adopt(path: Path, record: dict[str, Any]) -> Kept:
    """The state of learn that continues a finished run of tasks that lie in folders, files or datasets.

    The run's data stay where they are.

    Args:
        record: the content of run.json.

    Raises:
        RunDirectoryError: the run is not finished, or its stream is a benchmark's.
    """
    config = RunConfig.model_validate(record["config"]).model_copy(update={"output": str(path)})
    if record.get("finished") is None:
        raise RunDirectoryError(f"--into: {path} holds a run that is not finished; let `holdfast run` finish it first")
    if config.stream.name is not None:
        raise RunDirectoryError(
            f"--into: {path} holds a run of the stream {config.stream.name!r}, to which nothing can be appended; give "
            "another directory"
        )
    stream = load_stream(placed(config).stream, config.data, config.evaluation, path)
    tasks = []
    for source in find_source(config.stream).tasks:
        options = source.options
        assert isinstance(options, TaskConfig)
        if source.instruction is not None and options.instruction is None:
            options = options.model_copy(update={"instruction": source.instruction})
        tasks.append(options.model_dump(mode="json"))
    given = {key: value for key, value in config.model_dump(mode="json").items() if key not in ("stream", "output")}
    if isinstance(config.training.epochs, list):
        del given["training"]["epochs"]
    kept = Kept(path, given=given, settled={"seed": config.seed})
    for task, values in zip(stream.tasks, tasks, strict=True):
        facts = record["tasks"][task.name]
        format = "sentence_label" if "{sentence}" in task.asked else ""
        sides = {
            side: [GivenRow({}, example, *hashes(example, format)) for example in rows]
            for side, rows in (("train", task.train), ("test", task.test))
        }
        entry = {"name": task.name, "data": values["path"] or values["dataset"], "options": values, "training": {}}
        kept.note(entry | {"fingerprint": facts["fingerprint"]}, sides["train"], sides["test"])
    return kept
