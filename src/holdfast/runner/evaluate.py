"""A stage of a run evaluated again: in process, or the model behind an endpoint; what is answered is asked no more."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from holdfast.api.method import Method
from holdfast.api.task import General, Task
from holdfast.errors import ConfigError, RunDirectoryError
from holdfast.evaluation.at_test import ModelEvaluation
from holdfast.evaluation.served import EndpointModel
from holdfast.models.answers import AnswerCache
from holdfast.models.endpoint import Endpoint, only_model
from holdfast.records.directory import RunDirectory, slug
from holdfast.runner.measure import measure, responses_file
from holdfast.runner.reload import StoredStage, find_stage
from holdfast.runner.setup import Setup, prepare, resolve
from holdfast.scoring.score import task_score
from holdfast.system.files import locked_folder, read_json, read_jsonl, write_json
from holdfast.system.interrupt import Interrupt
from holdfast.system.progress import Progress

logger = logging.getLogger("holdfast")


@dataclass(frozen=True)
class Evaluated:
    """What was measured, beside what the run measured after the same stage.

    Attributes:
        output: the folder that holds the responses.
        metrics: of each task.
        scores: of each task, this time and in the run; None where not measured.
        general: the same of each measure of general ability.
        changed: of each task's responses, how many differ from the run's; None where there are none to compare.
    """

    output: Path
    metrics: dict[str, str]
    scores: dict[str, tuple[float | None, float | None]]
    general: dict[str, tuple[float | None, float | None]]
    changed: dict[str, int | None]


def evaluate(
    run: Path,
    *,
    stage: int | None = None,
    endpoint: Endpoint | None = None,
    output: Path | None = None,
    progress: Progress | None = None,
) -> Evaluated:
    """Measure a stage of a run again, on the same test examples; the run's own results stay as they are.

    Answers are kept as they come: the same call goes on where one was stopped or killed, or where the endpoint failed,
    and asks nothing twice.

    Args:
        run: a run's directory.
        stage: from 1, or 0 for the model before training; where absent, the one whose weights the run holds.
        endpoint: asks the model there, which need not be the run's, for responses; without a name, the only one that
            it serves. Losses and likelihoods of choices are not measured then, nor does a method act on the weights at
            test time.
        output: folder for responses and scores; where absent, one of the stage's, or of the stage's and the
            endpoint's, below ``evaluations`` in the run's directory.

    Raises:
        UserError: there is no such stage, its data have changed, ``output`` holds another evaluation, or the endpoint
            cannot be used or fails again and again.
        Interrupted: SIGINT or SIGTERM asked to stop.
    """
    found = find_stage(run, stage)
    setup = prepare(resolve(found.config))
    found.check_data(setup)
    output = output or run / "evaluations" / _name(found, endpoint)
    with locked_folder(output), Interrupt() as interrupt:
        if endpoint is not None and not endpoint.model:
            endpoint.model = _model_before(output, endpoint) or only_model(endpoint)
        _claim(output, found, endpoint)
        again = Remeasured(found, setup, endpoint, output, progress or Progress(), interrupt)
        if not (output / "evaluation.json").exists():
            again.measure()
        return again.evaluated()


def _name(found: StoredStage, endpoint: Endpoint | None) -> str:
    name = found.folder.name
    return name if endpoint is None else f"{name}-{slug(endpoint.url.partition('://')[2]).replace(':', '_')}"


def _model_before(output: Path, endpoint: Endpoint) -> str | None:
    """The model that was asked there when the evaluation began."""
    before = read_json(path)["endpoint"] if (path := output / "asked.json").exists() else None
    return before["model"] if before and before["url"] == endpoint.url else None


def _claim(output: Path, found: StoredStage, endpoint: Endpoint | None) -> None:
    """Say in ``asked.json`` what is evaluated here, or make sure that it is the same."""
    asked = {
        "stage": found.number,
        "weights": found.weights,
        "stream": found.run.info["stream"],
        "endpoint": endpoint and {"url": endpoint.url, "model": endpoint.model},
    }
    path = output / "asked.json"
    if path.exists():
        if (before := read_json(path)) != asked:
            differing = [
                f"{key}: {before.get(key)!r} -> {asked[key]!r}" for key in asked if asked[key] != before.get(key)
            ]
            raise RunDirectoryError(
                f"{output}: holds another evaluation ({'; '.join(differing)}); give another --output"
            )
        return
    if others := sorted(p.name for p in output.iterdir() if p.name != ".lock"):
        raise RunDirectoryError(f"{output}: holds other files ({', '.join(others[:3])}); give another --output")
    write_json(path, asked)


class Remeasured:
    """One evaluation at work."""

    def __init__(
        self,
        found: StoredStage,
        setup: Setup,
        endpoint: Endpoint | None,
        output: Path,
        progress: Progress,
        interrupt: Interrupt,
    ):
        self.found, self.setup, self.output = found, setup, output
        self.progress, self.interrupt = progress, interrupt
        self.served = None if endpoint is None else EndpointModel(endpoint)

    @cached_property
    def model(self) -> Any:
        """Loaded when it is first needed; None where it is behind an endpoint."""
        return self.found.measured_model(self.setup) if self.served is None else None

    def _evaluation(self, kept: AnswerCache) -> ModelEvaluation:
        return ModelEvaluation(
            model=self.model,
            encoder=self.setup.encoder,
            batch_size=self.found.config.evaluation.batch_size,
            methods=self.setup.applied,
            seed=self.found.config.seed,
            scorers=self.setup.scorers,
            kept=kept,
            served=self.served,
        )

    @cached_property
    def tasks(self) -> list[Task]:
        """Those that can be measured."""
        tasks, scorers = self.setup.stream.tasks, self.setup.scorers
        return [task for task in tasks if self.served is None or scorers[task.metric].reads == "response"]

    @cached_property
    def general(self) -> list[General]:
        """The same of measures of general ability."""
        return [one for one in self.setup.general if self.served is None or one.kind == "refusals"]

    def measure(self) -> None:
        """Ask what has no answer yet, and write what was measured."""
        if self.served is not None:
            self._warn()
        measure(
            RunDirectory(self.output),
            self.output,
            self.tasks,
            self.general,
            evaluation=self._evaluation,
            limit=lambda task: self.found.config.evaluation.max_new_tokens,
            bar=lambda title: self.interrupt.bar(self.progress, title),
        )

    def evaluated(self) -> Evaluated:
        """What was measured, read from its files."""
        run, row = self.found.run, self.found.row
        now = read_json(self.output / "evaluation.json")["general"]
        then = dict(zip(run.tasks, run.scores[row], strict=True))
        general = {name: values[row] for name, values in run.matrix["general"].items()}
        tasks = self.setup.stream.tasks
        responses = {task.name: self._responses(task.name) for task in tasks}
        scores = {
            task.name: task_score(found, task.metric) if (found := responses[task.name]) else None for task in tasks
        }
        return Evaluated(
            output=self.output,
            metrics={task.name: task.metric for task in tasks},
            scores={name: (score, then[name]) for name, score in scores.items()},
            general={name: (now.get(name), value) for name, value in general.items()},
            changed={name: _changed(found, run.responses(row, name)) for name, found in responses.items()},
        )

    def _responses(self, task: str) -> list[dict[str, Any]]:
        path = responses_file(self.output, task)
        return read_jsonl(path) if path.exists() else []

    def _warn(self) -> None:
        """Say what an endpoint is not asked for.

        Raises:
            ConfigError: that is everything.
        """
        left = [task.name for task in self.setup.stream.tasks if task not in self.tasks]
        left += [one.name for one in self.setup.general if one not in self.general]
        if left:
            logger.warning("not measured through an endpoint, which gives no likelihoods: %s", ", ".join(left))
        if not self.tasks and not self.general:
            raise ConfigError("--endpoint: none of the run's tasks is scored by responses; evaluate it without")
        for method in self.setup.applied:
            if type(method).at_test is not Method.at_test:
                logger.warning("method %r acts on the model at test time, which an endpoint's does not", method.name)


def _changed(now: list[dict[str, Any]], then: list[dict[str, Any]]) -> int | None:
    """How many responses differ."""
    if not now or len(now) != len(then) or "response" not in now[0]:
        return None
    return sum(one["response"] != other["response"] for one, other in zip(now, then, strict=True))
