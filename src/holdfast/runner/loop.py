"""The stage loop: train, evaluate, remember, checkpoint, report; and resume anywhere in it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from holdfast.api.task import Task
from holdfast.config.run import RunConfig, load_config
from holdfast.errors import GateFailed
from holdfast.evaluation.at_test import ModelEvaluation
from holdfast.evaluation.general import (
    evaluate_general,
)
from holdfast.evaluation.respond import evaluate_task, response_limit
from holdfast.models.answers import AnswerCache
from holdfast.records.directory import RunDirectory, current_stage, open_directory
from holdfast.records.gate import Increase, failed, judge, record
from holdfast.runner.curves import Curves
from holdfast.runner.load import load_model, trained_weights
from holdfast.runner.matrix import read_matrix
from holdfast.runner.measure import measure
from holdfast.runner.plan import START, PlannedStage
from holdfast.runner.setup import Setup, prepare, resolve
from holdfast.runner.stage import train_stage
from holdfast.scoring.score import scorer, task_score
from holdfast.system.files import read_json
from holdfast.system.interrupt import Interrupt
from holdfast.system.progress import Progress
from holdfast.training.method_state import load_states, save_states


def run(config: RunConfig | dict[str, Any] | str | Path, progress: Progress | None = None) -> dict[str, Any]:
    """Train on every task of the stream in turn and measure all of them after each; continue where a run stopped.

    Args:
        config: a configuration, or the mapping or YAML file that :func:`holdfast.load_config` reads.
        progress: where to show progress; standard error where absent.

    Returns:
        what matrix.json holds (DESIGN 4.3).

    Raises:
        UserError: the configuration, data or directory cannot be used, or a loss is not finite.
        GateFailed: a stage failed the configuration's gate, whose ``on_fail`` is ``stop``.
        Interrupted: SIGINT or SIGTERM asked the run to stop; the same call continues it.
    """
    if not isinstance(config, RunConfig):
        config = load_config(config)
    with open_directory(Path(config.output)) as directory, Interrupt() as interrupt:
        resolved = resolve(config)
        directory.check_config(resolved.config)
        setup = prepare(resolved)
        model_folder = directory.way_to(resolved.config.model.name)
        directory.begin(resolved.config, setup.facts() | {"model_folder": model_folder})
        return RunLoop(setup, directory, progress or Progress(quiet=not directory.process.main), interrupt).go()


class RunLoop:
    """One run at work. Everything that must survive a restart is in its directory, nothing in this object."""

    def __init__(self, setup: Setup, directory: RunDirectory, progress: Progress, interrupt: Interrupt):
        self.setup = setup
        self.config = setup.config
        self.directory = directory
        self.progress = progress
        self.interrupt = interrupt
        self._model: Any = None
        self._states: Path | None = None  # where the methods' states were loaded from, before an engine has the model
        self._limits: dict[str, int] = {}

    def go(self) -> dict[str, Any]:
        """Do what is left to do."""
        done = self._done()
        self._measure(done[-1])
        self._judge(done[-1])
        for stage in self.setup.stages[len(done) - 1 :]:
            self._train(stage)
            self._measure(stage)
            self._judge(stage)
        matrix = self._write_matrix()
        self.directory.finish(**self._cost())
        self._report()
        return matrix

    @property
    def model(self) -> Any:
        """The model with its tuner, at the weights that the run holds."""
        if self._model is None:
            self._model = self._load_model()
        return self._model

    def _folder(self, stage: PlannedStage) -> Path:
        return self.directory.stage(stage.index, stage.name)

    def _done(self) -> list[PlannedStage]:
        """The stages that are trained, after the start."""
        return [START, *(stage for stage in self.setup.stages if self._there(self._folder(stage) / "stage.json"))]

    def _there(self, path: Path) -> bool:
        return self.directory.exists(path)

    def _held(self) -> PlannedStage:
        """The stage whose weights the run holds: the last one that is trained, if the gate did not go back."""
        done = self._done()
        return done[current_stage(self.directory.record, done[-1].index)]

    def _load_model(self) -> Any:
        model = load_model(self.setup)
        held = self._held()
        if held.index:
            folder = self._folder(held)
            self.setup.tuner.load(model, folder / self.setup.tuner.folder)
            self._states = folder / "method"
            load_states(self.setup.applied, self._states, model)
        if "parameters" not in self.directory.record:
            self.directory.record["parameters"] = {
                "total": sum(p.numel() for p in model.parameters()),
                "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
            }
            self.directory.write()
        return model

    def _train(self, stage: PlannedStage) -> None:
        folder = self._folder(stage)
        model, held = self.model, self._held()
        if held.index:
            expected = read_json(self._folder(held) / "stage.json")["weights"]
            if trained_weights(model) != expected:
                raise RuntimeError(
                    f"stage {stage.index} would not start from the weights that stage {held.index} ended with"
                )
        curves = self._curves(stage)
        trained = train_stage(
            self.setup, stage, self.directory, model, self._states, self.progress, self.interrupt, curves
        )
        self._states = None
        what = f"stage {stage.index} ({stage.name}): trained {trained['steps']} steps in {trained['seconds']:.0f} s"
        if curves.stopped:
            what += "; stopped early, since the loss on {general} rose from {before:.3f} to {loss:.3f}, beyond {limit}"
            what = what.format(**curves.stopped)
        self.progress.line(what)
        with self.directory.whole_folder(folder / self.setup.tuner.folder) as partial:
            self.setup.tuner.save(model, partial)
            if self.directory.process.main:
                self.setup.encoder.tokenizer.save_pretrained(partial)
        with self.directory.whole_folder(folder / "method") as partial:
            save_states(self.setup.applied, partial)
        self.directory.write_json(
            folder / "stage.json",
            {"stage": stage.index, "task": stage.name} | trained | {"weights": trained_weights(model)},
        )
        if self.directory.process.main:
            shutil.rmtree(folder / "checkpoint", ignore_errors=True)

    def _measure(self, stage: PlannedStage) -> None:
        """Evaluate every task and the general abilities after a stage; what is there already is not asked again."""
        folder = self._folder(stage)
        if self._there(folder / "evaluation.json"):
            return
        when = f"after stage {stage.index} ({stage.name})" if stage.index else "before training"
        measure(
            self.directory,
            folder,
            self.setup.stream.tasks,
            self.setup.general,
            evaluation=self._evaluation,
            limit=lambda task: self.config.evaluation.max_new_tokens or self._response_limit(task),
            bar=self._bar,
            when=when,
        )
        matrix = self._write_matrix()
        scores = zip(matrix["tasks"], matrix["scores"][stage.row], strict=True)
        shown = [f"{name} {'not measured' if score is None else f'{score:.3f}'}" for name, score in scores]
        self.progress.line(f"{when}: {', '.join(shown)}")

    def _curves(self, stage: PlannedStage) -> Curves:
        """What is measured while a stage trains."""
        settings, gate = self.config.evaluation, self.config.gate
        texts = [measure for measure in self.setup.general if measure.kind == "perplexity"]
        limit = gate.max_general_loss_increase if gate is not None and gate.stop_early else None

        def scores() -> dict[str, float]:
            found = {}
            for task in stage.tasks:
                limit = settings.max_new_tokens or self._response_limit(task)
                records = evaluate_task(self._evaluation(), task, max_new_tokens=limit)
                found[task.name] = task_score(records, task.metric)
            return found

        return Curves(
            path=self.directory.path / "curves.jsonl",
            stage=stage,
            every=settings.every,
            scores=scores,
            general_every=settings.watch_general,
            general=lambda: evaluate_general(self._evaluation(), texts),
            before=read_json(self._folder(START) / "evaluation.json")["general"],
            limit=None if limit is None else Increase.read(limit),
        )

    def _judge(self, stage: PlannedStage) -> None:
        """Hold a stage against the gate, write down what follows, and do it; what is decided already stays so.

        A run that the gate stopped is judged again, since its limits may be other ones by now.
        """
        from holdfast.records.read import read_run
        from holdfast.report.verdict import as_text

        gate, decisions = self.config.gate, self.directory.record.get("gate", [])
        if decisions and (decisions[-1]["stage"], decisions[-1]["action"]) == (stage.index, "stop"):
            decisions = decisions[:-1]
        if gate is None or stage.index == 0 or stage.index in (decision["stage"] for decision in decisions):
            return
        matrix = self._write_matrix()
        checks = judge(read_run(self.directory.path), gate, stage.row)
        action = gate.on_fail if failed(checks) else "continue"
        rejected = {decision["stage"] for decision in decisions if not decision["passed"]}
        current = stage.index
        if action == "rollback":
            current = max(t for t in range(stage.index) if t not in rejected)
        decision = {
            "stage": stage.index,
            "task": stage.name,
            "passed": not failed(checks),
            "action": action,
            "current": current,
            "checks": record(checks),
            "scores": matrix["scores"][stage.row],
        }
        self.directory.record["gate"] = [*decisions, decision]
        self.directory.write()
        if not failed(checks):
            return
        what = f"gate after stage {stage.index} ({stage.name}) failed"
        if action == "stop":
            self._report()
            raise GateFailed(f"{what}; the run stops\n{as_text(failed(checks))}")
        if action == "rollback":
            # As a new process would find it: methods without what they learned in this stage, and the older weights.
            self.setup, self._model = self.setup.renewed(), None
            self._write_matrix()
            what += f"; the run goes back to stage {current}" if current else "; the run goes back to its start"
        self.progress.line(f"{what}\n{as_text(failed(checks))}")

    def _evaluation(self, kept: AnswerCache | None = None) -> ModelEvaluation:
        config = self.config
        return ModelEvaluation(
            model=self.model,
            encoder=self.setup.encoder,
            methods=self.setup.applied,
            batch_size=config.evaluation.batch_size,
            seed=config.seed,
            scorers=self.setup.scorers,
            kept=kept,
        )

    def _response_limit(self, task: Task) -> int | None:
        if scorer(task.metric).reads == "response" and task.name not in self._limits:
            self._limits[task.name] = response_limit(self.setup.encoder, task)
        return self._limits.get(task.name)

    def _bar(self, title: str) -> AbstractContextManager[Callable[[int, int], None]]:
        return self.interrupt.bar(self.progress, title)

    def _write_matrix(self) -> dict[str, Any]:
        matrix = read_matrix(self.setup, self.directory)
        self.directory.write_json(self.directory.path / "matrix.json", matrix)
        return matrix

    def _cost(self) -> dict[str, Any]:
        """What the run cost, for run.json; a run that trains nothing has no peak of memory."""
        start, *stages = [self._folder(stage) for stage in [START, *self.setup.stages]]
        trained = [read_json(folder / "stage.json") for folder in stages]
        return {
            "seconds": {
                "train": sum(stage["seconds"] for stage in trained),
                "evaluate": sum(read_json(folder / "evaluation.json")["seconds"] for folder in [start, *stages]),
            },
            "tokens": sum(stage["tokens"] for stage in trained),
            "peak_memory_gib": max((stage["peak_memory_gib"] for stage in trained), default=None),
        }

    def _report(self) -> None:
        from holdfast.report import write_report

        if not self.directory.process.main:
            return
        path = write_report([self.directory.path], self.directory.path / "report.html")
        self.progress.line(f"report: {path}")
