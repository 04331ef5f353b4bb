"""One call of learn: take the rows in, settle what the user did not say, and run.

torch is imported once the rows are read, so that what is wrong with them is told at once.
"""

from __future__ import annotations

import datetime
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from holdfast.api.task import Example, Stream, Task
from holdfast.config.reading import validate
from holdfast.config.run import RUN, RunConfig, placed
from holdfast.config.stream import DataConfig, TaskConfig
from holdfast.data.fitting import Fitting, asks_nothing, fitting
from holdfast.data.formats import asked
from holdfast.data.given import Given, GivenRow, given_files, given_name, read_given
from holdfast.data.order import check_names as check_task_names
from holdfast.data.sides import Divided, divide
from holdfast.data.source import scored
from holdfast.errors import RunDirectoryError
from holdfast.models.pretrained import check_model_files
from holdfast.records.directory import RunDirectory, open_directory
from holdfast.records.kept import OWN, Kept, merged, rows_fingerprint
from holdfast.records.shapes import read_json
from holdfast.runner.data import RunData, run_data
from holdfast.runner.learn.adopt import adopt
from holdfast.runner.learn.call import Call, check_memory, check_model, check_task
from holdfast.runner.learn.unkept import unkept_stream
from holdfast.runner.names import check_names
from holdfast.system.collection import no_collection
from holdfast.system.interrupt import Interrupt
from holdfast.system.progress import Progress

WHERE = "the configuration of learn"
LONGEST_RESPONSE = 256
"""Tokens of a response to an open question that is generated for the metrics beside the loss."""
UNASKED = (
    "nothing in the prompts says what is asked, so the model may answer anything with one of these answers; "
    "task.columns={TEXT: sentence, ANSWER: label} and task.instruction, such as 'Name the queue.', say it, in a "
    "directory of its own"
)
"""What a user is told of labels without an instruction."""


def learn_call(call: Call, progress: Progress | None, accept_changes: bool) -> dict[str, Any]:
    """Do what :func:`holdfast.learn` says, unless nothing is to be done."""
    with open_directory(call.path) as directory, Interrupt() as interrupt:
        process = directory.process
        progress = progress or Progress(quiet=not process.main)
        taken = Taken(call, directory, progress, interrupt) if process.main else None
        while True:
            values = process.broadcast(taken.next_run() if taken else None)
            if values is None:
                return read_json(call.path / "matrix.json")
            with no_collection():
                from holdfast.runner.loop import run_in
            config = RunConfig.model_validate(values["config"])
            if directory.record:
                go_on(directory.record, config)
            matrix = run_in(
                directory,
                interrupt,
                config,
                progress,
                accept_changes=accept_changes,
                data=values["data"],
                learns=True,
            )
            if values["last"]:
                return matrix


def go_on(record: dict[str, Any], config: RunConfig) -> None:
    """Let a record have the form of the configuration that continues it, where that says the same in other words.

    The model may lie elsewhere now, and the stream may have been a folder, not a list of tasks. Files, rows and prompts
    are compared with what they were.
    """
    known, stream = len(record["tasks"]), config.stream.model_dump(mode="json")
    record["config"]["model"]["name"] = config.model.name
    record["config"]["stream"] = stream | {"tasks": stream["tasks"][:known]}
    record["stream"] = record["stream"] | {"name": "tasks"}


class Taken:
    """A call at work in the process that writes the directory."""

    def __init__(self, call: Call, directory: RunDirectory, progress: Progress, interrupt: Interrupt):
        self.call, self.directory, self.progress, self.interrupt = call, directory, progress, interrupt
        kept = Kept.read(call.path)
        if not directory.record:  # no call came so far that the model was measured
            kept = self._first(kept)
        elif kept is None:
            kept = adopt(call.path, directory.record)
        else:
            kept.drop_unbegun()
        check_memory(kept, call)
        check_model(kept, call)
        self.kept = kept
        self.given = merged(kept.given, call.values)
        self._find_model()

    def _first(self, before: Kept | None) -> Kept:
        """The state at the first call; an earlier one that did not come far leaves nothing but the same samples."""
        call, path = self.call, self.call.path
        if (path / "stages").exists():
            raise RunDirectoryError(f"{path}: run.json is missing; restore it from a copy")
        if before is not None:
            same = before.given.get("model") == call.values.get("model") and before.find(call.fingerprint)
            if not same:
                shutil.rmtree(path / OWN, ignore_errors=True)
            before.drop_unbegun()
        return Kept(path, memory=call.memory is not False)

    def _find_model(self) -> None:
        """Where the model lies now, if the run and its model were moved together."""
        name, moved = self.given.get("model", {}).get("name"), self.directory.record.get("model_folder")
        if moved is not None and not Path(name).exists() and (there := self.call.path.resolve() / moved).exists():
            self.given["model"]["name"] = str(there.resolve())

    def next_run(self) -> dict[str, Any] | None:
        """The configuration of the next run, and whether it is the last; None: nothing is to be learned."""
        kept, call = self.kept, self.call
        if kept.finished():
            return self._run(self.given, last=True) if self._take() else None
        task = kept.tasks[-1]
        same = call.data == task["data"] if call.fingerprint is None else call.fingerprint == task["fingerprint"]
        if same and call.name in (None, task["name"]):
            check_task(task, call)
            return self._run(self.given, last=True)
        if not kept.memory:
            raise RunDirectoryError(
                f"{call.path}: {task['name']!r} is not finished, and the run keeps no rows: give {task['data']} first"
            )
        self.progress.line(f"{task['name']} is not finished, and comes first")
        return self._run(kept.given, last=False)

    def _run(self, given: dict[str, Any], last: bool) -> dict[str, Any]:
        kept = self.kept
        config = self._config(given, [task["options"] for task in kept.tasks], kept.tasks[-1]["training"])
        if asks_for_own(config):
            from holdfast.runner.learn.settings import write_own_samples

            write_own_samples(self.call.path, config, kept.own, self.progress, self.interrupt)
        data = None if kept.memory else self._unkept(config)
        return {"config": config.model_dump(mode="json"), "last": last, "data": data}

    def _unkept(self, config: RunConfig) -> RunData:
        """The data of a run that keeps no rows."""
        kept = self.kept
        given = self._read(self._source(kept.tasks[-1]["name"]), config.data)
        recorded = self.directory.record.get("tasks", {})
        stream = unkept_stream(kept, recorded, config.data, config.evaluation, given)
        return run_data(stream, placed(config))

    def _config(
        self, given: dict[str, Any], tasks: list[dict[str, Any]], training: dict[str, Any] | None = None
    ) -> RunConfig:
        """The configuration of the run: what the user said, over what was settled for a task, over what is settled."""
        values = merged(merged(self.kept.settled, {"training": training or {}}), given)
        values.pop("task", None)
        values |= {"stream": {"tasks": tasks}, "output": str(self.call.path)}
        config = validate(RunConfig, values, WHERE)
        check_names(config)
        check_model_files(config.model)
        return config

    def _source(self, name: str) -> TaskConfig:
        """How the rows of the data are read."""
        place = "dataset" if given_files(self.call.data) is None else "path"
        values = {"name": name, place: self.call.data} | (self.given.get("task") or {})
        return validate(TaskConfig, values, f"{WHERE}: task")

    def _read(self, options: TaskConfig, settings: DataConfig) -> Given:
        """The rows of the data; raises as :func:`read_given`."""
        inherited = "columns" not in (self.call.values.get("task") or {})
        output = self.call.path if self.kept.memory else None  # a list would say what stands in rows
        return read_given(self.call.data, options, settings, inherited, output)

    def _take(self) -> bool:
        """Take the new rows of the data in; False: there are none."""
        kept, call = self.kept, self.call
        name = kept.free_name(call.name or given_name(call.data))
        check_task_names([name])
        options = self._source(name)
        self._config(self.given, [options.model_dump()])  # is the rest of it right?
        settings = validate(DataConfig, self.given.get("data") or {}, f"{WHERE}: data")
        given = self._read(options, settings)
        rows = [row for part in given.rows.values() for row in part]
        divided = divide(given, *kept.seen(), settings.hold_out)
        if not divided.train:
            self.progress.line(f"{call.data}: all {len(rows)} rows are learned already; nothing is trained")
            return False
        fit = fitting([row.example for row in rows], given.options.labels, given.options.metric)
        if not kept.memory and options.labels is None:
            fit = replace(fit, labels=None)  # they were read from rows
            given.options = given.options.model_copy(update={"labels": None})
        folder = kept.next_folder(name).relative_to(call.path)
        task = kept_options(given.options, fit, f"{RUN}/{folder.as_posix()}")
        new = as_task(task, divided)
        self._tell(given, divided, fit)
        with no_collection():
            from holdfast.runner.learn.settings import Lengths, check_rows, memory_settings, training_settings
        examples = [row.example for row in divided.train]
        if not kept.settled:
            self._settle(options, examples)
        adapters = "tuner" in kept.settled and "tuner" not in self.given
        training = training_settings(len(examples), adapters)
        config = self._config(self.given, [task], training)
        if "micro_batch_size" not in (self.given.get("training") or {}):
            training |= memory_settings(config, Lengths(config, examples))
        check_rows(Stream("tasks", [new]), config)
        kept.given = self.given
        if not kept.tasks:
            kept.write()  # it shows whose directory this is before anything else lies there
        kept.add(
            {
                "name": name,
                "data": call.data,
                "fingerprint": call.fingerprint or rows_fingerprint(rows),
                "options": task,
                "training": training,
                "why": fit.why,
                "notes": [*given.notes, *divided.notes] if kept.memory else [],  # they may tell of rows
                "at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            },
            divided,
            {"train": rows_of(new.train, divided.train), "test": rows_of(new.test, divided.test)},
        )
        return True

    def _tell(self, given: Given, divided: Divided, fit: Fitting) -> None:
        """Say what is learned, what is held out, and what is measured."""
        known = f"; {divided.known} more are known from before, and left out" if divided.known else ""
        beside = f", beside it {' and '.join(fit.beside)}" if fit.beside else ""
        lines = [
            *given.notes,
            f"{len(divided.train)} rows to learn, {len(divided.test)} to test{known}",
            *divided.notes,
            f"metric {fit.metric}{beside}: {fit.why}",
        ]
        bare = fit.labels and given.options.format == "prompt_answer"
        if bare and asks_nothing([row.example for row in divided.train]):
            lines.append(UNASKED)
        for line in lines:
            self.progress.line(f"{given.name}: {line}")

    def _settle(self, options: TaskConfig, examples: list[Example]) -> None:
        """Settle once what holds for all that the run learns."""
        from holdfast.runner.learn import settings

        kept, tasks = self.kept, [options.model_dump()]
        methods, general = "method" in self.given, (self.given.get("evaluation") or {}).get("general") is not None
        kept.settled = settings.type_settings(self._config(self.given, tasks))
        config = self._config(self.given, tasks)
        if not (methods and general) or asks_for_own(config):
            kept.own = settings.own_samples(config, settings.sample_length(settings.Lengths(config, examples)))
        if not methods:
            kept.settled |= {"tuner": {"name": "lora"}, "method": settings.rehearsal_settings(kept.own, kept.memory)}
        if not general and (measures := settings.general_settings(config, kept.own)):
            kept.settled["evaluation"] = {"general": measures}
        if not kept.memory:
            kept.settled = merged(kept.settled, {"evaluation": {"responses": "scores"}})


def asks_for_own(config: RunConfig) -> bool:
    """Whether the general ability is measured on samples that the model writes into the run."""
    return any(measure.path == f"{RUN}/{OWN}" for measure in config.evaluation.general or ())


def as_task(options: dict[str, Any], divided: Divided) -> Task:
    """The new task with its rows as they were given; raises as :func:`scored`."""
    task = TaskConfig.model_validate(options)
    train, test = ([row.example for row in side] for side in (divided.train, divided.test))
    return scored(Task(task.name, "", train, test, labels=task.labels), task)


def rows_of(examples: Sequence[Example], rows: list[GivenRow]) -> list[GivenRow]:
    """The rows that these very examples were read from."""
    wanted = set(map(id, examples))
    return [row for row in rows if id(row.example) in wanted]


def kept_options(options: TaskConfig, fit: Fitting, path: str) -> dict[str, Any]:
    """The task of the run's stream: its rows lie in the run, under the names that their format has."""
    values = options.model_dump(
        exclude_defaults=True, exclude={"path", "dataset", "subset", "columns", "beside", "images"}
    )
    values |= {"path": path, "metric": fit.metric, "beside": options.beside or fit.beside}
    if fit.labels is not None:
        values["labels"] = fit.labels
    if options.format == "sentence_label" and options.instruction is None:
        values.setdefault("prompt", asked(None, None))
    if "rouge_l" in values["beside"]:
        values.setdefault("max_new_tokens", LONGEST_RESPONSE)
    return values
