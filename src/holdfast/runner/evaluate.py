"""Measure a stage of a run again, in process or through an endpoint; a killed evaluation continues."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from holdfast.api.method import Method
from holdfast.api.task import General, Task
from holdfast.errors import ConfigError, RunDirectoryError
from holdfast.evaluation.at_test import ModelEvaluation
from holdfast.evaluation.served import EndpointModel
from holdfast.models.answers import AnswerCache
from holdfast.models.endpoint import Endpoint, only_model
from holdfast.records.directory import RunDirectory, keeps_rows, slug
from holdfast.records.growth import Past
from holdfast.records.shapes import read_json, read_jsonl
from holdfast.runner.answering import Answering
from holdfast.runner.due import Due
from holdfast.runner.measure import measure, responses_file
from holdfast.runner.reload import StoredStage, find_stage
from holdfast.runner.setup import Setup, prepare, resolve
from holdfast.scoring.score import task_score
from holdfast.system.files import LOCK, json_file, locked_folder
from holdfast.system.interrupt import Interrupt
from holdfast.system.manifest import MANIFEST, write_noted
from holdfast.system.progress import Progress

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

logger = logging.getLogger("holdfast")

Pair = tuple[float | None, float | None]
"""A value measured now, and the run's own; None where not measured."""


@dataclass(frozen=True)
class Remeasured:
    """The results of an evaluation, beside what the run measured after the same stage.

    Attributes:
        output: the folder that holds the responses.
        metrics: the metric of each task.
        scores: of each task.
        general: of each measure of general ability.
        changed: how many responses to each task differ from the run's; None where there are none to compare.
    """

    output: Path
    metrics: dict[str, str]
    scores: dict[str, Pair]
    general: dict[str, Pair]
    changed: dict[str, int | None]


def evaluate(
    run: Path,
    *,
    stage: int | None = None,
    endpoint: Endpoint | None = None,
    output: Path | None = None,
    progress: Progress | None = None,
    accept_changes: bool = False,
    trust: bool = False,
) -> Remeasured:
    """Measure a stage of a run again on the same test examples; the run's own results stay as they are.

    Answers are saved as they come. After a kill, a stop or a failure of the endpoint, the same call continues and asks
    nothing twice.

    Args:
        run: a run's directory.
        stage: from 1, or 0 for the model before training; None: the stage whose weights the run holds.
        endpoint: a server whose model responds in the place of the run's. It may serve another model; without a name,
            the only one that it serves. Losses and likelihoods of choices are not measured then, and methods do not
            act on the weights at test time.
        output: folder for responses and scores; None: a folder below ``evaluations`` in the run's directory, named by
            the stage and the endpoint.
        progress: shows the progress; None: on standard error.
        accept_changes: measure although data, model, tokenizer, texts or code are no longer those of the run.
        trust: run the code that the run's record names, and send its judge the key that it names.

    Raises:
        UserError: there is no such stage, the run keeps no rows, its data or other inputs have changed, ``output``
            holds another evaluation, or the endpoint cannot be used or fails again and again.
        Interrupted: SIGINT or SIGTERM asked to stop.
    """
    stored = find_stage(run, stage, trust=trust, measures=True)
    if not keeps_rows(run):
        raise ConfigError(
            f"{run}: keeps no rows (--memory none), so its tasks cannot be measured again; `holdfast status` has what "
            "was measured"
        )
    setup = prepare(resolve(stored.config), past=Past.of(stored.run.path, stored.run.info))
    stored.check_data(setup, through_endpoint=endpoint is not None, accept_changes=accept_changes)
    output = output or run / "evaluations" / _folder_name(stored, endpoint)
    with locked_folder(output), Interrupt() as interrupt:
        if endpoint is not None and not endpoint.model:
            endpoint.model = _model_asked_before(output, endpoint) or only_model(endpoint)
        _claim(output, stored, endpoint)
        remeasurement = Remeasurement(stored, setup, endpoint, output, progress or Progress(), interrupt)
        if not (output / "evaluation.json").exists():
            remeasurement.measure()
        return remeasurement.results()


def _folder_name(stored: StoredStage, endpoint: Endpoint | None) -> str:
    name = stored.folder.name
    return name if endpoint is None else f"{name}-{slug(endpoint.url.partition('://')[2]).replace(':', '_')}"


def _model_asked_before(output: Path, endpoint: Endpoint) -> str | None:
    """The model at this endpoint that an unfinished evaluation began with."""
    before = read_json(path)["endpoint"] if (path := output / "asked.json").exists() else None
    return before["model"] if before and before["url"] == endpoint.url else None


def _claim(output: Path, stored: StoredStage, endpoint: Endpoint | None) -> None:
    """Write in ``asked.json`` what is evaluated here; if it is there, check that it is the same.

    Raises:
        RunDirectoryError: the folder holds another evaluation, or other files.
    """
    wanted = {
        "stage": stored.number,
        "weights": stored.weights,
        "stream": stored.run.info["stream"],
        "endpoint": endpoint and {"url": endpoint.url, "model": endpoint.model},
    }
    path = output / "asked.json"
    if path.exists():
        if (before := read_json(path)) != wanted:
            changed = [key for key in wanted if before.get(key) != wanted[key]]
            differing = [f"{key}: {before.get(key)!r} -> {wanted[key]!r}" for key in changed]
            raise RunDirectoryError(
                f"{output}: holds another evaluation ({'; '.join(differing)}); give another --output"
            )
        return
    if others := sorted(p.name for p in output.iterdir() if p.name not in (LOCK, MANIFEST)):
        raise RunDirectoryError(f"{output}: holds other files ({', '.join(others[:3])}); give another --output")
    write_noted(output, path, json_file(wanted))


class Remeasurement:
    """An evaluation at work."""

    def __init__(
        self,
        stored: StoredStage,
        setup: Setup,
        endpoint: Endpoint | None,
        output: Path,
        progress: Progress,
        interrupt: Interrupt,
    ):
        self.stored, self.setup, self.output = stored, setup, output
        self.progress, self.interrupt = progress, interrupt
        self.endpoint = None if endpoint is None else EndpointModel(endpoint)

    @cached_property
    def model(self) -> PreTrainedModel | PeftModel | None:
        """The stage's model, loaded when it is first needed; None if an endpoint responds."""
        return self.stored.measured_model(self.setup) if self.endpoint is None else None

    @cached_property
    def tasks(self) -> list[Task]:
        """The tasks that can be measured, with the metrics that can."""
        tasks, scorers = self.setup.stream.tasks, self.setup.scorers
        if self.endpoint is None:
            return tasks
        responds = {name for name, scorer in scorers.items() if scorer.reads == "response"}
        return [
            replace(task, beside=[name for name in task.beside if name in responds])
            for task in tasks
            if task.metric in responds
        ]

    @cached_property
    def general(self) -> list[General]:
        """The measures of general ability that can be taken."""
        return [one for one in self.setup.general if self.endpoint is None or one.kind == "refusals"]

    def measure(self) -> None:
        """Ask for the answers that are not there yet, and write the results."""
        if self.endpoint is not None:
            self._warn()
        stage = self.stored.folder if self.stored.number else None
        with (
            Answering(self.stored.config, self.setup.tuner, self.setup.max_length) as answering,
            answering.of(stage, lambda: cast(Any, self.model).dtype) as responder,
        ):
            measure(
                RunDirectory(self.output),
                self.output,
                Due(self.tasks, self.general),
                [task.name for task in self.tasks],
                evaluation=lambda answers: replace(self._evaluation(answers), responder=responder),
                longest=lambda task: self.setup.limits.get(task.name),
                bar=lambda title: self.interrupt.bar(self.progress, title),
            )

    def results(self) -> Remeasured:
        """The results, read from their files."""
        run, row = self.stored.run, self.stored.row
        tasks = self.setup.stream.tasks
        responses = {task.name: self._responses(task.name) for task in tasks}
        scores = {
            task.name: task_score(rows, task.metric) if (rows := responses[task.name]) else None for task in tasks
        }
        own_scores = dict(zip(run.tasks, run.scores[row], strict=True))
        general = read_json(self.output / "evaluation.json")["general"]
        return Remeasured(
            output=self.output,
            metrics={task.name: task.metric for task in tasks},
            scores={name: (score, own_scores[name]) for name, score in scores.items()},
            general={name: (general.get(name), values[row]) for name, values in run.matrix["general"].items()},
            changed={name: _changed(rows, run.responses(row, name)) for name, rows in responses.items()},
        )

    def _evaluation(self, answers: AnswerCache) -> ModelEvaluation:
        return ModelEvaluation(
            model=self.model,
            encoder=self.setup.encoder,
            batch_size=self.stored.config.evaluation.batch_size,
            methods=self.setup.applied,
            seed=self.stored.config.seed,
            scorers=self.setup.scorers,
            answers=answers,
            endpoint=self.endpoint,
        )

    def _responses(self, task: str) -> list[dict[str, Any]]:
        path = responses_file(self.output, task, [one.name for one in self.tasks])
        return read_jsonl(path) if path.exists() else []

    def _warn(self) -> None:
        """Warn of what cannot be measured through an endpoint.

        Raises:
            ConfigError: nothing can be measured.
        """
        measured = {task.name for task in self.tasks}
        left_out = [task.name for task in self.setup.stream.tasks if task.name not in measured]
        left_out += [one.name for one in self.setup.general if one not in self.general]
        if left_out:
            logger.warning("not measured through an endpoint, which gives no likelihoods: %s", ", ".join(left_out))
        if not self.tasks and not self.general:
            raise ConfigError("--endpoint: none of the run's tasks is scored by responses; evaluate it without")
        for method in self.setup.applied:
            if type(method).at_test is not Method.at_test:
                logger.warning("method %r acts on the model at test time, which an endpoint's does not", method.name)


def _changed(now: list[dict[str, Any]], before: list[dict[str, Any]]) -> int | None:
    """How many responses differ; None if there are no responses, or not the same number of them."""
    if not now or len(now) != len(before) or "response" not in now[0]:
        return None
    return sum(one["response"] != other["response"] for one, other in zip(now, before, strict=True))
