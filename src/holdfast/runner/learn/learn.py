"""`learn`: teach a run what a user gives, and know again what it was taught before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from holdfast.data.row_pictures import KEPT
from holdfast.errors import ConfigError
from holdfast.records.kept import Kept
from holdfast.records.shapes import read_json
from holdfast.runner.learn.call import check_memory, check_model, check_task, read_call
from holdfast.runner.learn.take import learn_call
from holdfast.system.progress import Progress


def learn(
    data: str | Path,
    into: str | Path,
    model: str | Path | None = None,
    *,
    name: str | None = None,
    metric: str | None = None,
    memory: str | None = None,
    config: dict[str, Any] | str | Path | None = None,
    overrides: list[str] | None = None,
    progress: Progress | None = None,
    accept_changes: bool = False,
) -> dict[str, Any]:
    """Learn new data into a run, which the first call begins; go on with a call that was stopped or killed.

    Rows that the run has learned or tested before are left out. Of data without a test split, rows are held out, each
    prompt on the same side in every call. Whatever the configuration does not say follows from the machine, the model
    and the data.

    Args:
        data: a data file, a folder of them (with splits or without), or a Hugging Face dataset.
        into: the run's directory.
        model: folder or hub name of the model to teach; the first call needs it.
        name: of the new task; None: as the data are called, with a number if a task is called so already.
        metric: how the task is scored; None: by what its answers are.
        memory: "rows" (the default) keeps the rows that are given in the directory, to be rehearsed and measured later;
            "none" keeps hashes of them only.
        config: keys of a run's configuration but ``stream`` and ``output``, and ``task`` (how rows are read), as a
            mapping or a YAML file. They hold from this call on. Only ``training`` and ``gate`` may change later.
        overrides: ``key.path=value`` strings, as on the command line.
        progress: shows the progress; None: on standard error.
        accept_changes: as of :func:`holdfast.run`.

    Returns:
        The content of matrix.json.

    Raises:
        UserError: the data, the configuration or the directory cannot be used; the run learned from another model.
        GateFailed: the stage failed the configuration's gate, whose ``on_fail`` is ``stop``.
        Interrupted: SIGINT or SIGTERM asked to stop; the same call continues.
    """
    call = read_call(data, into, model, name, metric, memory, config, overrides)
    begun = (call.path / "run.json").is_file()
    kept = Kept.read(call.path) if begun else None
    if kept is not None:
        check_memory(kept, call)
        check_model(kept, call)
        seen = (call.path / KEPT).is_dir()  # a file of rows can be the same, and the pictures that it names others
        if not seen and kept.finished() and (task := kept.find(call.fingerprint)) is not None:
            check_task(task, call)
            (progress or Progress()).line(f"{call.data}: is learned already, as {task['name']}; nothing is trained")
            return read_json(call.path / "matrix.json")
    elif "model" not in call.values and not begun:
        raise ConfigError(f"--model: {call.path} has learned nothing yet, so say which model is to learn")
    return learn_call(call, progress, accept_changes)
