"""What a user asks of learn, and whether it fits the run that is there."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from holdfast.config.model import ModelConfig
from holdfast.config.reading import read_values
from holdfast.data.given import files_fingerprint, given_files
from holdfast.errors import ConfigError
from holdfast.records.kept import Kept

MEMORY = {"rows": True, "none": False}
"""Whether a run keeps the rows that it was given."""


@dataclass(frozen=True)
class Call:
    """What a user asks for.

    Attributes:
        path: the run's directory.
        data: a file, a folder or a dataset of Hugging Face.
        values: keys of the configuration, and of ``task``, how its rows are read and scored.
        name: of the task; None: as the data are called.
        memory: whether rows are kept; None: not said.
        fingerprint: of the files; None: of a dataset, whose rows must be read first.
    """

    path: Path
    data: str
    values: dict[str, Any]
    name: str | None
    memory: bool | None
    fingerprint: str | None


def read_call(
    data: str | Path,
    into: str | Path,
    model: str | Path | None,
    name: str | None,
    metric: str | None,
    memory: str | None,
    config: dict[str, Any] | str | Path | None,
    overrides: list[str] | None,
) -> Call:
    """Read what :func:`holdfast.learn` is given.

    Raises:
        ConfigError: the configuration has a key that is not for learn, or a value that none can have; there are no such
            data.
    """
    values = read_values({} if config is None else config, overrides)
    for key, instead in (("stream", "DATA is the stream's next task; task says how it is read"), ("output", "--into")):
        if key in values:
            raise ConfigError(f"{key}: is not for learn: {instead}")
    _check_task_keys(values.get("task"))
    for option, text in (("--name", name), ("--metric", metric)):
        if text is not None and not text.strip():
            raise ConfigError(f"{option}: is empty; leave it out, or say what it is")
    if model is not None:
        values["model"] = _section(values.get("model", {})) | {"name": str(model)}
    if "model" in values:
        section = values["model"] = _section(values["model"])
        if isinstance(section.get("name"), str) and Path(section["name"]).exists():
            section["name"] = str(Path(section["name"]).resolve())
    if metric is not None:
        values["task"] = dict(values.get("task") or {}) | {"metric": metric}
    if memory is not None and memory not in MEMORY:
        raise ConfigError(f"--memory: must be {' or '.join(MEMORY)}, not {memory!r}")
    files = given_files(str(data))
    fingerprint = None if files is None else files_fingerprint(file for part in files.values() for file in part)
    keeps = None if memory is None else MEMORY[memory]
    return Call(Path(into), str(data), values, name, keeps, fingerprint)


def _check_task_keys(task: Any) -> None:
    """Raise ConfigError if ``task`` is none, or says what the command itself does."""
    if task is None:
        return
    if not isinstance(task, dict):
        raise ConfigError(
            f"task: must be a section that says how rows are read, such as {{format: text}}, not {task!r:.60}"
        )
    for key, instead in (("name", "--name"), ("path", "DATA"), ("dataset", "DATA")):
        if key in task:
            raise ConfigError(f"task.{key}: is not for learn: {instead} says it")


def _section(value: Any) -> dict[str, Any]:
    if isinstance(value, str):
        return {"name": value}
    if not isinstance(value, dict):
        raise ConfigError(f"model: must be a name or a section, not {value!r:.60}")
    return dict(value)


def check_memory(kept: Kept, call: Call) -> None:
    """Raise ConfigError if rows are to be kept of a run that keeps none, or the other way round."""
    if call.memory is not None and call.memory != kept.memory:
        recorded = next(name for name, keeps in MEMORY.items() if keeps == kept.memory)
        raise ConfigError(f"--memory: {call.path} began with {recorded!r}, which holds for all that it learns")


def check_task(task: dict[str, Any], call: Call) -> None:
    """Raise ConfigError if a task that was taken in before is now to be read or scored in another way."""
    began = task["options"] | (task.get("given", {}).get("task") or {})
    for key, wanted in (call.values.get("task") or {}).items():
        if wanted != began.get(key):
            raise ConfigError(
                f"{key}: {task['name']!r} was taken in with {began.get(key)!r}, not {wanted!r}, and stays so; leave it "
                f"out, or learn the data otherwise into another directory"
            )


def check_model(kept: Kept, call: Call) -> None:
    """Raise ConfigError if a run is to learn from another model; one that has moved is the same."""
    recorded, wanted = (
        kept.given.get("model", call.values.get("model", {})).get("name"),
        call.values.get("model", {}).get("name"),
    )
    if wanted is None or wanted == recorded:
        return
    if Path(recorded).exists():
        from holdfast.runner.inputs import model_inputs

        if Path(wanted).exists() and model_inputs(ModelConfig(name=wanted)) == model_inputs(ModelConfig(name=recorded)):
            call.values["model"]["name"] = recorded
            return
    elif Path(wanted).exists():
        return  # it lies elsewhere now; that its files are the same is checked with all other inputs
    raise ConfigError(
        f"--model: {call.path} has learned from {recorded}, and what it learned fits no other model; leave --model "
        f"out, or give {wanted} a directory of its own with --into"
    )
