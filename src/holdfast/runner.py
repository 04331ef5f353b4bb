"""The stage loop: train, evaluate, remember, checkpoint, report; and resume anywhere in it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from holdfast import zero
from holdfast.attention import fastest
from holdfast.config import RunConfig, load_config
from holdfast.curves import Curves
from holdfast.data.task import Task
from holdfast.directory import RunDirectory, current_stage, open_directory, slug
from holdfast.engines import loaded, loading
from holdfast.errors import ConfigError, GateFailed
from holdfast.evaluation.at_test import Evaluation
from holdfast.evaluation.general import (
    evaluate_general,
    matrix_name,
)
from holdfast.evaluation.kept import Kept
from holdfast.evaluation.measure import measure
from holdfast.evaluation.respond import evaluate_task, response_limit
from holdfast.evaluation.score import beside_score, scorer, statistics, task_score, total
from holdfast.files import read_json, read_jsonl
from holdfast.gate import Increase, failed, judge, record
from holdfast.interrupt import Interrupt
from holdfast.methods.saved import load_states, save_states
from holdfast.metrics import area_under_curve, by_task, clipped_backward_transfer, intervals, summarize
from holdfast.progress import Progress
from holdfast.quantization import ready_for_training, weight_options
from holdfast.setup import Planned, Setup, prepare, resolve
from holdfast.shards import at_rest, fingerprint, is_divided, trainable
from holdfast.stage import train_stage
from holdfast.tuners.base import Tuner


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
        config = resolve(config)
        directory.check_config(config)
        setup = prepare(config)
        directory.begin(config, setup.facts() | {"model_folder": directory.way_to(config.model.name)})
        return Run(setup, directory, progress or Progress(quiet=not directory.process.main), interrupt).go()


START = Planned(0, "start", (), 0)
"""Before training."""


class Run:
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

    def _folder(self, stage: Planned) -> Path:
        return self.directory.stage(stage.index, stage.name)

    def _done(self) -> list[Planned]:
        """The stages that are trained, after the start."""
        return [START, *(stage for stage in self.setup.stages if self._there(self._folder(stage) / "stage.json"))]

    def _there(self, path: Path) -> bool:
        return self.directory.exists(path)

    def _held(self) -> Planned:
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

    def _train(self, stage: Planned) -> None:
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

    def _measure(self, stage: Planned) -> None:
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
        self.progress.line(f"{when}: " + ", ".join(f"{name} {score:.3f}" for name, score in scores))

    def _curves(self, stage: Planned) -> Curves:
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

    def _judge(self, stage: Planned) -> None:
        """Hold a stage against the gate, write down what follows, and do it; what is decided already stays so.

        A run that the gate stopped is judged again, since its limits may be other ones by now.
        """
        from holdfast.report.read import read_run
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
            self.setup, self._model = prepare(self.config), None
            self._write_matrix()
            what += f"; the run goes back to stage {current}" if current else "; the run goes back to its start"
        self.progress.line(f"{what}\n{as_text(failed(checks))}")

    def _evaluation(self, kept: Kept | None = None) -> Evaluation:
        config = self.config
        return Evaluation(
            model=self.model,
            encoder=self.setup.encoder,
            methods=self.setup.applied,
            batch_size=config.evaluation.batch_size,
            seed=config.seed,
            scorers=self.setup.stream.scorers,
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


def read_matrix(setup: Setup, directory: RunDirectory) -> dict[str, Any]:
    """Build what matrix.json holds (DESIGN 4.3) from the responses in the stages' folders."""
    tasks = setup.stream.tasks
    rows: list[list[Any]] = [[None] * len(tasks) for _ in range(len(tasks) + 1)]
    general: dict[str, list[float | None]] = {matrix_name(g): [None] * (len(tasks) + 1) for g in setup.general}
    stages = [START, *setup.stages]
    for stage in stages:
        held = stages[current_stage(directory.record, stage.index)]
        folder = directory.stage(held.index, held.name)
        for j, task in enumerate(tasks):
            path = folder / "responses" / f"{slug(task.name)}.jsonl"
            if path.exists():
                rows[stage.row][j] = read_jsonl(path)
        if (folder / "evaluation.json").exists():
            for name, value in read_json(folder / "evaluation.json")["general"].items():
                general[name][stage.row] = value
    if not setup.stages:  # nothing is trained, so every row is the first one
        rows = [rows[0]] * len(rows)
        general = {name: values[:1] * len(rows) for name, values in general.items()}
    metrics = {task.name: task.metric for task in tasks}
    scores = [
        [
            None if records is None else task_score(records, task.metric)
            for task, records in zip(tasks, row, strict=True)
        ]
        for row in rows
    ]
    columns = {
        task.name: {name: [row[j] and beside_score(row[j], name) for row in rows] for name in task.beside}
        for j, task in enumerate(tasks)
    }
    samples = [
        [None if r is None else statistics(r, task.metric) for task, r in zip(tasks, row, strict=True)] for row in rows
    ]
    totals = [total(task.metric) for task in tasks]
    resamples = setup.config.evaluation.bootstrap
    return {
        "tasks": [task.name for task in tasks],
        "metrics": metrics,
        "scores": scores,
        "beside": {task: values for task, values in columns.items() if values},
        "floors": {task.name: scores[0][j] for j, task in enumerate(tasks) if setup.stream.scorers[task.metric].floor},
        "general": general,
        "joint": scores[-1] if setup.methods[0].schedule == "joint" else None,
        "summary": summarize(scores, metrics=metrics, general=general),
        "clipped_backward_transfer": clipped_backward_transfer(scores, metrics=metrics),
        "by_task": by_task(scores, metrics=metrics),
        "curves": read_curves(setup, directory, scores),
        "intervals": intervals(samples, metrics=metrics, totals=totals, resamples=resamples) if resamples else {},
    }


def read_curves(setup: Setup, directory: RunDirectory, scores: list[list[Any]]) -> dict[str, Any]:
    """The learning curve of each task that was evaluated while its stage trained: steps, scores and the area under it.

    A curve begins with the model that the stage began with and ends with the one that it made.
    """
    path = directory.path / "curves.jsonl"
    measured = [line for line in (read_jsonl(path) if path.exists() else []) if "scores" in line]
    names = [task.name for task in setup.stream.tasks]
    curves = {}
    for stage in setup.stages:
        folder = directory.stage(stage.index, stage.name)
        lines = [line for line in measured if line["stage"] == stage.index]
        if not lines or not (folder / "evaluation.json").exists():
            continue
        last = read_json(folder / "stage.json")["steps"]
        for task in stage.tasks:
            before = scores[stage.index - 1][names.index(task.name)]
            after = task_score(read_jsonl(folder / "responses" / f"{slug(task.name)}.jsonl"), task.metric)
            between = [(line["step"], line["scores"][task.name]) for line in lines if line["step"] < last]
            points = [(0, before), *between, (last, after)]
            steps, values = [list(column) for column in zip(*points, strict=True)]
            curves[task.name] = {"steps": steps, "scores": values, "area": area_under_curve(steps, values)}
    return curves


def load_model(setup: Setup) -> Any:
    """:func:`load_pretrained` of a run."""
    return load_pretrained(setup.config, setup.tuner)


def load_pretrained(config: RunConfig, tuner: Tuner) -> Any:
    """The pretrained model with its tuner, on this machine's device; new weights follow from the seed.

    Raises:
        ConfigError: the weights cannot be loaded.
    """
    from transformers import AutoModelForCausalLM, set_seed

    model = config.model
    device = "cuda" if torch.cuda.is_available() else "cpu"
    attention = model.attention or fastest(config.training.precision)
    options: dict[str, Any] = {"attn_implementation": attention} if attention else {}
    options |= weight_options(model, device) | loading(config.training.engine)
    zero.load_whole()
    set_seed(config.seed)
    try:
        pretrained = AutoModelForCausalLM.from_pretrained(
            model.name,
            revision=model.revision,
            trust_remote_code=model.trust_remote_code,
            **options,
        )
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.name: the weights of {model.name!r} cannot be loaded: {error}") from None
    if model.quantization:
        pretrained = ready_for_training(pretrained)
    elif not is_divided(pretrained):
        pretrained = pretrained.to(device)
    loaded(pretrained)
    prepared = tuner.prepare(pretrained)
    trained = {name: p.requires_grad for name, p in prepared.named_parameters()}
    at_rest(prepared)  # a tuner that tries a pass has frozen whole weights, and not the pieces that they are made of
    for name, p in prepared.named_parameters():
        p.requires_grad_(trained[name])
    return prepared


def trained_weights(model: nn.Module) -> str:
    """SHA-256 over the trainable weights, by name."""
    return fingerprint(trainable(model).items())
