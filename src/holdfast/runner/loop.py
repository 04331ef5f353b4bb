"""The stage loop: train, measure, judge, report, stage by stage; it continues wherever it was stopped."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from holdfast.api.task import Task
from holdfast.config.run import RunConfig
from holdfast.errors import GateFailed, RunDirectoryError
from holdfast.evaluation.at_test import ModelEvaluation
from holdfast.evaluation.general import evaluate_general, matrix_name
from holdfast.evaluation.respond import evaluate_task
from holdfast.models.answers import AnswerCache
from holdfast.models.gguf import origin
from holdfast.models.sight import copy_processor
from holdfast.models.weights import check_weights
from holdfast.records.directory import REBUILD, RunDirectory, current_stage, learned_stages
from holdfast.records.follow import Followers, followed
from holdfast.records.gate import Check, Decision, Increase, failed, judge
from holdfast.records.read import read_run
from holdfast.records.shapes import read_json
from holdfast.records.shift import DRAWN
from holdfast.records.stages import is_older_than_the_gate
from holdfast.records.trackers import chosen
from holdfast.rehearsal.keep import budget_checks, verdict_text
from holdfast.report.text import at_chance, number
from holdfast.runner import shift
from holdfast.runner.answering import Answering, require_engine_of_answers
from holdfast.runner.begun import as_begun
from holdfast.runner.curves import Curves
from holdfast.runner.data import RunData
from holdfast.runner.decisions import decide, must_judge, standing, strictest
from holdfast.runner.due import Due, due
from holdfast.runner.inputs import run_inputs
from holdfast.runner.load import load_model, load_weights, trained_weights
from holdfast.runner.matrix import MeasuredFiles, Outline, write_matrix
from holdfast.runner.measure import is_measured, measure, responses_file
from holdfast.runner.memory import lower_for_evaluation, what_to_lower
from holdfast.runner.plan import START, PlannedStage
from holdfast.runner.setup import Setup, check_growth, prepare, resolve
from holdfast.runner.stage import Around, check_training, train_stage
from holdfast.runner.unmoved import take_over
from holdfast.scoring.score import task_score
from holdfast.system.files import write_json
from holdfast.system.interrupt import Interrupt
from holdfast.system.manifest import check
from holdfast.system.progress import Later, Progress, clock
from holdfast.training.method_state import load_states, save_states
from holdfast.training.watch import checkpoint_to_continue

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


def run_in(
    directory: RunDirectory,
    interrupt: Interrupt,
    config: RunConfig,
    progress: Progress | None = None,
    *,
    accept_changes: bool = False,
    backfill: bool = False,
    data: RunData | None = None,
    learns: bool = False,
) -> dict[str, Any]:
    """As :func:`holdfast.run`, in a directory that is open already.

    Args:
        learns: whether :func:`holdfast.learn` runs it.
        data: what :func:`holdfast.runner.data.load_data` would give, of a run that keeps no rows.
    """
    resolved = resolve(as_begun(config, directory.record))
    directory.check_config(resolved.config, learns=learns)
    trackers = chosen(resolved.config.training.report_to)
    setup = prepare(resolved, data, directory.past(), begins=not directory.record)
    appended = check_growth(setup, directory)
    check_training(setup)
    require_engine_of_answers(setup.config)
    if not directory.record:
        check_weights(resolved.config.model)
    model_folder = directory.way_to(resolved.config.model.name)
    directory.begin(
        setup.config,
        setup.facts() | {"model_folder": model_folder},
        inputs=directory.process.broadcast(run_inputs(setup) if directory.process.main else None),
        accept_changes=accept_changes,
        recorded=setup.facts(-len(appended)) if appended else None,
    )
    shown = progress or Progress(quiet=not directory.process.main)
    answering = Answering(setup.config, setup.tuner, setup.max_length)
    with followed(directory, resolved.config, trackers) as followers, answering:
        return RunLoop(setup, directory, shown, interrupt, followers, answering).go(backfill)


class RunLoop:
    """A run at work. All that must survive a restart is in the run's directory, nothing in this object."""

    def __init__(
        self,
        setup: Setup,
        directory: RunDirectory,
        progress: Progress,
        interrupt: Interrupt,
        followers: Followers,
        answering: Answering,
    ):
        self.setup = setup
        self.followers = followers
        self.answering = answering
        self.config = setup.config
        self.directory = directory
        self.progress = progress
        self.interrupt = interrupt
        self._files = MeasuredFiles()
        self._model: PreTrainedModel | PeftModel | None = None
        self._states: Path | None = None  # where the methods' states were loaded from, before an engine has the model

    def go(self, backfill: bool = False) -> dict[str, Any]:
        """Do what is left to do, and return the content of matrix.json."""
        for task in self.setup.stream.tasks:
            for note in task.notes:
                self.progress.line(f"task {task.name}: {note}")
        done = self._done()
        if len(done) <= len(self.setup.stages):
            self.followers.begin()
        self.directory.end_stages([stage.index for stage in done])
        measured = self.directory.exists(self._folder(done[-1]) / "evaluation.json")
        self._settle(done[-1], judge=not (measured and is_older_than_the_gate(self.directory.record, done[-1].index)))
        for stage in self.setup.stages[len(done) - 1 :]:
            self._train(stage)
            self._settle(stage)
        if backfill:
            self._backfill()
            self.followers.catch_up()
        matrix = self._write_matrix()
        self.directory.finish(self._cost())
        self._report()
        return matrix

    @property
    def model(self) -> PreTrainedModel | PeftModel:
        """The model with its tuner and the weights that the run holds; loaded when it is first needed."""
        if self._model is None:
            self._model = self._load_model(self._current())
        return self._model

    # --- where the run stands ---

    def _folder(self, stage: PlannedStage) -> Path:
        return self.directory.stage(stage.index, stage.name)

    def _done(self) -> list[PlannedStage]:
        """The start, and the stages that are trained."""
        trained = [s for s in self.setup.stages if self.directory.exists(self._folder(s) / "stage.json")]
        for planned, stage in zip(self.setup.stages, trained, strict=False):
            if planned is not stage:
                raise RunDirectoryError(
                    f"{self._folder(planned)}: is missing, though {self._folder(stage).name} is there; restore it from "
                    "a copy"
                )
        return [START, *trained]

    def _current(self) -> PlannedStage:
        """The stage whose weights the run holds: the last trained one, unless the run or its gate went back."""
        done = self._done()
        return done[current_stage(self.directory.record, done[-1].index)]

    # --- train ---

    def _load_model(self, stage: PlannedStage) -> PreTrainedModel | PeftModel:
        """Load the model with the weights and the methods' states of a stage."""
        model = load_model(self.setup)
        if stage.index:
            folder = self._folder(stage)
            check(folder / self.setup.tuner.folder)
            load_weights(self.setup.tuner, model, folder)
            self._states = folder / "method"
            load_states(self.setup.applied, self._states, model)
        if "parameters" not in self.directory.record:
            self.directory.record["parameters"] = {
                "total": sum(p.numel() for p in model.parameters()),
                "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
            }
            self.directory.record["converted_from"] = origin(model.config)
            self.directory.write()
        return model

    def _train(self, stage: PlannedStage) -> None:
        """Train a stage and write its weights, its methods' states and, last, stage.json."""
        model = self.model
        self._check_start(stage)
        self.directory.record["steps"] = self.setup.steps
        self.directory.begin_stage(stage.index, stage.name, self.setup.config_of(stage), self.setup.fingerprint(stage))
        drawn = self._drawn(stage)
        curves = self._curves(stage)
        around = Around(self.progress, self.interrupt, self.followers, curves, self._later(stage))
        trained = train_stage(self.setup, stage, self.directory, model, self._states, around)
        self._states = None
        what = f"stage {stage.index} ({stage.name}): trained {trained['steps']} steps in {trained['seconds']:.0f} s"
        if curves.stopped:
            what += "; stopped early, since the loss on {general} rose from {before:.3f} to {loss:.3f}, beyond {limit}"
            what = what.format(**curves.stopped)
        self.progress.line(what)
        if trained.get("keep"):
            self.progress.line(verdict_text(trained["keep"]))
        folder = self._folder(stage)
        with self.directory.whole_folder(folder / self.setup.tuner.folder) as partial:
            self.setup.tuner.save(model, partial)
            if self.directory.process.main:
                self.setup.encoder.tokenizer.save_pretrained(partial)
                if self.setup.encoder.sight is not None:
                    copy_processor(self.config.model, partial)
        with self.directory.whole_folder(folder / "method") as partial:
            save_states(self.setup.applied, partial)
        moved = {} if drawn is None else {"shift": shift.measure(self.setup, drawn, model)}
        record = {"stage": stage.index, "task": stage.name} | trained | moved | {"weights": trained_weights(model)}
        self.directory.write_json(folder / "stage.json", record)
        self.directory.end_stages([stage.index])
        if self.directory.process.main:
            shutil.rmtree(folder / "checkpoint", ignore_errors=True)
            (folder / DRAWN).unlink(missing_ok=True)

    def _drawn(self, stage: PlannedStage) -> shift.Drawn | None:
        """Responses of the model before a stage, which a run that was killed in it finds again.

        Where the run keeps no texts, they are not written, and are lost with a kill.
        """
        folder = self._folder(stage)
        if self.directory.exists(folder / DRAWN):
            return shift.Drawn(**read_json(folder / DRAWN))
        if checkpoint_to_continue(folder / "checkpoint")[0] is not None:
            return None
        drawn = shift.draw(self.setup, stage, self.model, self.progress)
        if drawn is not None and self.config.evaluation.responses == "texts" and self.directory.process.main:
            write_json(folder / DRAWN, asdict(drawn))
        return drawn

    def _later(self, stage: PlannedStage) -> Later:
        """What follows a stage's training: evaluations, each as long as the last one was, and the stages after it.

        Says how long the stage will be evaluated, and what its first step waits for.
        """
        once = read_json(self._folder(self._current()) / "evaluation.json")["seconds"]
        steps = self.setup.steps[stage.index - 1 :]
        known = []
        if any(getattr(method.options, "drawn", False) for method in self.setup.methods):
            known.append("before the first one the model writes samples")
        if once >= 1:
            known.append(f"an evaluation follows, of about {clock(once)}, if it takes as long as the one before")
        if known:
            self.progress.line(f"stage {stage.index} ({stage.name}): {steps[0]} steps; {'; '.join(known)}")
        return Later(sum(steps[1:]), len(steps) * once)

    def _check_start(self, stage: PlannedStage) -> None:
        """RuntimeError if the model does not have the weights that the stage must start from."""
        current = self._current()
        if not current.index:
            return
        recorded = read_json(self._folder(current) / "stage.json")["weights"]
        if all(trained_weights(self.model, former) != recorded for former in (False, True)):
            raise RuntimeError(
                f"stage {stage.index} would not start from the weights that stage {current.index} ended with"
            )

    def _curves(self, stage: PlannedStage) -> Curves:
        """What is measured while a stage trains."""
        settings, gate = self.config.evaluation, self.config.gate
        texts = [one for one in self.setup.general if one.kind == "perplexity"]
        limit = gate.max_general_loss_increase if gate is not None and gate.stop_early else None

        def scores() -> dict[str, float]:
            by_task = {}
            for task in stage.tasks:
                records = evaluate_task(self._evaluation(), task, max_new_tokens=self._longest(task))
                by_task[task.name] = task_score(records, task.metric)
            return by_task

        return Curves(
            path=self.directory.path / "curves.jsonl",
            stage=stage,
            every=settings.every,
            scores=scores,
            general_every=settings.watch_general,
            general=lambda: evaluate_general(self._evaluation(), texts),
            before=read_json(self._folder(START) / "evaluation.json")["general"],
            followers=self.followers,
            limit=None if limit is None else Increase.read(limit),
        )

    # --- measure ---

    def _settle(self, stage: PlannedStage, judge: bool = True) -> None:
        """Measure and judge the last trained stage, and measure what is not measured of the model that the run goes on
        with: tasks that were appended since, and where the gate goes back. Then the trackers are told."""
        if self._current().index == stage.index:
            self._measure(stage, self._due(stage))
            if judge:
                self._judge(stage)
        self._measure(self._current(), self._due(stage))
        self.followers.catch_up()

    def _due(self, stage: PlannedStage) -> Due:
        """What is measured of the model that the run holds after a stage."""
        everything = self._everything()
        return due(self.config.evaluation, stage, self.setup.stages, everything.tasks, everything.general)

    def _everything(self) -> Due:
        return Due(self.setup.stream.tasks, self.setup.general)

    def _backfill(self) -> None:
        """Measure what was left out, such as tasks that were appended later, after each stage whose model is a row of
        the score matrix."""
        done = self._done()
        for stage in [done[t] for t in sorted({current_stage(self.directory.record, s.index) for s in done})]:
            if is_measured(self.directory, self._folder(stage), self._everything(), self._names()):
                continue
            self.setup, self._model = self.setup.renewed(), None
            self._model = self._load_model(stage)
            self._measure(stage, self._everything())
        self._model = None

    def _measure(self, stage: PlannedStage, of: Due) -> None:
        """Measure the model of a stage, unless that is done."""
        folder, names = self._folder(stage), self._names()
        if is_measured(self.directory, folder, of, names):
            return
        self.directory.reopen()
        known = self._shown_before(folder)
        when = f"after stage {stage.index} ({stage.name})" if stage.index else "before training"
        if (same := take_over(self.setup, self.directory, stage, of)) is not None:
            self.progress.line(f"{when}: the weights are those of stage {same.index}, and so are the results")
        told = what_to_lower(lambda: f"evaluation {when}", lambda: lower_for_evaluation(self.config))
        with told, self.answering.of(folder if stage.index else None, lambda: self.model.dtype) as responder:
            measure(
                self.directory,
                folder,
                of,
                names,
                evaluation=lambda answers: replace(self._evaluation(answers), responder=responder),
                longest=self._longest,
                bar=self._bar,
                when=when,
                texts=self.config.evaluation.responses == "texts",
            )
        new = ({task.name for task in of.tasks} | {matrix_name(one) for one in of.general}) - known
        matrix = self._write_matrix()
        self.progress.line(f"{when}: {self._changes(matrix, stage, new)}")
        if not stage.index and (note := at_chance(matrix)) is not None:
            self.progress.line(note)

    def _shown_before(self, folder: Path) -> set[str]:
        """The tasks and general abilities that were measured when others were not known yet."""
        if not self.directory.exists(folder / "evaluation.json"):
            return set()
        names = self._names()
        measured = {name for name in names if self.directory.exists(responses_file(folder, name, names))}
        return measured | set(read_json(folder / "evaluation.json")["general"])

    def _names(self) -> list[str]:
        return [task.name for task in self.setup.stream.tasks]

    def _changes(self, matrix: dict[str, Any], stage: PlannedStage, new: set[str]) -> str:
        """Each score and general ability that is new, before a stage and after it."""
        rows = [s.row for s in (START, *self.setup.stages)][max(stage.index - 1, 0) : stage.index + 1]
        columns = zip(matrix["tasks"], zip(*matrix["scores"], strict=True), strict=True)
        shown = []
        for name, column in [*columns, *matrix["general"].items()]:
            values = [number(column[row]) for row in rows if row == stage.row or column[row] is not None]
            if name in new:
                shown.append(f"{name} {' -> '.join(values)}")
        return ", ".join(shown)

    def _evaluation(self, answers: AnswerCache | None = None) -> ModelEvaluation:
        return ModelEvaluation(
            model=self.model,
            encoder=self.setup.encoder,
            methods=self.setup.applied,
            batch_size=self.config.evaluation.batch_size,
            seed=self.config.seed,
            scorers=self.setup.scorers,
            answers=answers,
        )

    def _longest(self, task: Task) -> int | None:
        """The longest response to a task's examples, in tokens; None where nothing is generated."""
        return self.setup.limits.get(task.name)

    def _bar(self, title: str) -> AbstractContextManager[Callable[[int, int], None]]:
        return self.interrupt.bar(self.progress, title)

    # --- judge ---

    def _judge(self, stage: PlannedStage) -> None:
        """Hold a stage against the gate, write down what follows, and do it; a stage is judged once."""
        gate, keep = self.config.gate, self.config.keep
        decisions = standing(self.directory.record.get("gate", []), stage)
        if (gate is None and keep is None) or not must_judge(decisions, stage):
            return
        scores = self._write_matrix()["scores"][stage.row]
        limits = [] if gate is None else judge(read_run(self.directory.path), gate, stage.row)
        verdict = read_json(self._folder(stage) / "stage.json").get("keep")
        budgets = [] if verdict is None else budget_checks(verdict)
        wanted = [s.on_fail for s, own in ((gate, limits), (keep, budgets)) if s is not None and failed(own)]
        checks, learned = [*limits, *budgets], learned_stages(self.directory.record, stage.index - 1)
        decision = decide(decisions, stage, checks, strictest(wanted), scores, learned)
        self.directory.record["gate"] = [*decisions, decision]
        self.directory.write()
        if not decision["passed"]:
            self._act(decision, failed(checks))

    def _act(self, decision: Decision, broken: list[Check]) -> None:
        """Do what was decided after a stage that failed.

        Args:
            broken: the checks that did not pass.

        Raises:
            GateFailed: the run stops.
        """
        from holdfast.report.verdict import as_text

        name = "budget" if self.config.gate is None else "gate"
        what = f"{name} after stage {decision['stage']} ({decision['task']}) failed"
        match decision["action"]:
            case "stop":
                self.followers.catch_up()
                self._report()
                raise GateFailed(f"{what}; the run stops\n{as_text(broken)}")
            case "rollback":
                # The state of a new process: the older weights, and methods without what this stage taught them.
                self.setup, self._model = self.setup.renewed(), None
                self._write_matrix()
                back = f"stage {decision['current']}" if decision["current"] else "its start"
                what += f"; the run goes back to {back}"
        self.progress.line(f"{what}\n{as_text(broken)}")

    # --- report ---

    def _write_matrix(self) -> dict[str, Any]:
        return write_matrix(Outline.of(self.setup), self.directory, self._files)

    def _cost(self) -> dict[str, Any]:
        """The cost of the run, for run.json; without training there is no peak of memory."""
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
        self.followers.report(path)
        if not self.directory.path.name.endswith(REBUILD):  # which soon lies elsewhere
            self.progress.line(f"report: {path}")
