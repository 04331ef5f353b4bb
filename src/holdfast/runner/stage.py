"""One stage's training: its trainer, its TrainingArguments, and what is watched while it trains."""

from __future__ import annotations

import random
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainingArguments

from holdfast.api.rows import row_length
from holdfast.data.collate import Collator, pack
from holdfast.engines.autocast import own_forward_after
from holdfast.records.directory import learned_stages
from holdfast.runner.kinds import prompt_tokens, reward_of, trained_rows
from holdfast.runner.memory import lower_for_training, what_to_lower
from holdfast.runner.pitfalls import warn_of_pitfalls, warn_of_steps
from holdfast.runner.plan import PlannedStage
from holdfast.runner.rows import StageRows, files_of
from holdfast.runner.setup import build_tuner
from holdfast.training.arguments import training_arguments
from holdfast.training.kinds import as_before, check_mismatched, config_class, make_trainer, own_arguments
from holdfast.training.settings import check_settings
from holdfast.training.state import RunContext
from holdfast.training.trainer import ContinualTrainer
from holdfast.training.watch import Watch, checkpoint_to_continue

if TYPE_CHECKING:
    from holdfast.records.directory import RunDirectory
    from holdfast.records.follow import Followers
    from holdfast.runner.curves import Curves
    from holdfast.runner.setup import Setup
    from holdfast.system.interrupt import Interrupt
    from holdfast.system.progress import Later, Progress


@dataclass(frozen=True)
class Around:
    """What watches a stage, is measured in it, and follows it."""

    progress: Progress
    interrupt: Interrupt
    followers: Followers
    curves: Curves
    later: Later


def train_stage(
    setup: Setup,
    stage: PlannedStage,
    directory: RunDirectory,
    model: Any,
    states: Path | None,
    around: Around,
) -> dict[str, Any]:
    """Train a stage from its newest whole checkpoint, or from its start.

    Args:
        states: the folder from which the methods' states were loaded since the last stage, if they were. They are
            loaded again when an engine has divided the model.

    Returns:
        for the stage's record: ``steps`` (optimizer steps), what they cost (:meth:`.Cost.state`), and
        ``stopped_early``, if the general loss ended the stage.

    Raises:
        Interrupted: the run was asked to stop; a checkpoint is saved.
    """
    parts = [(files_of(task), setup.rows[task.name]) for task in stage.tasks]
    all_rows = StageRows(parts)
    rows = list(all_rows) if all(isinstance(part, list) for _, part in parts) else all_rows
    checkpoints = directory.stage(stage.index, stage.name) / "checkpoint"
    checkpoint, step = checkpoint_to_continue(checkpoints)
    directory.trim_events(stage.index, step)
    context: dict[str, Any] = {
        "method": setup.applied,
        "task": stage.name,
        "stage_index": len(learned_stages(directory.record, stage.index - 1)) + 1,
        "run_context": RunContext(
            rows=rows,
            dev=[row for task in stage.tasks for row in setup.dev.get(task.name, ())],
            describe_rows=lambda places: rows_by_file([all_rows.origin(place) for place in places]),
            states=states,
            folder=directory.path / "rehearsal",
            tokenizer=setup.encoder.tokenizer,
            encode=setup.encoder.apart().encode_all,
        ),
    }
    with own_forward_after(model), nullcontext() if stage.tasks[0].kind == "sft" else as_before(model):
        trainer = _trainer(setup, stage, model, rows, arguments(setup, stage, checkpoints), context)
        watch = StageWatch(
            trainer,
            f"stage {stage.index}/{len(setup.stages)} {stage.name}",
            directory.path / "events.jsonl",
            stage,
            around,
        )
        with what_to_lower(
            lambda: f"{watch.title}, step {trainer.state.global_step + 1}",
            lambda: lower_for_training(
                setup.config_of(stage),
                build_tuner(setup.config),
                max(map(row_length, rows)),
                trainer.args.per_device_train_batch_size,
            ),
        ):
            steps = watch.train(checkpoint)
    stopped = {"stopped_early": around.curves.stopped} if around.curves.stopped else {}
    kept = {} if setup.keep is None else {"keep": setup.keep.verdict}
    return {"steps": steps} | trainer.cost.of_all(directory.process) | stopped | kept


def _trainer(
    setup: Setup,
    stage: PlannedStage,
    model: Any,
    rows: Sequence[dict[str, Any]],
    args: TrainingArguments,
    context: dict[str, Any],
) -> Any:
    """The trainer of a stage's kind."""
    task, encoder = stage.tasks[0], setup.encoder
    if task.kind == "sft":
        return ContinualTrainer(
            model=model,
            args=args,
            train_dataset=pack(rows, setup.max_length) if setup.config.data.packing else rows,
            data_collator=Collator(encoder.tokenizer.pad_token_id),
            **context,
        )
    return make_trainer(
        task.kind,
        model,
        trained_rows(task, encoder.apart()),
        encoder.tokenizer,
        args=args,
        reward=reward_of(task, encoder),
        prompt_tokens=prompt_tokens(task, encoder.apart(), setup.limits.get(task.name, 0)),
        **context,
    )


def rows_by_file(rows: list[tuple[str, int]]) -> str:
    """(file, row) pairs for a message: ``train.json rows 3, 7; other.json rows 1``."""
    files: dict[str, list[int]] = {}
    for file, row in sorted(rows):
        files.setdefault(file, []).append(row)
    return "; ".join(f"{file} rows {', '.join(map(str, numbers))}" for file, numbers in files.items())


def arguments(setup: Setup, stage: PlannedStage, checkpoints: Path) -> TrainingArguments:
    """TrainingArguments of a stage.

    Raises:
        ConfigError: the batch cannot be divided among the processes, or transformers does not take a value.
    """
    training = setup.training[stage.index - 1]
    fields = {
        "num_train_epochs": training.epochs,
        "max_steps": training.max_steps or -1,
        "lr_scheduler_type": training.schedule,
        "warmup_steps": training.warmup,
        "optim": training.optimizer,
        "seed": stage_seed(setup.config.seed, stage.index),
    }
    task = stage.tasks[0]
    fields |= own_arguments(task.kind, task.options, setup.max_length) | task.options
    return training_arguments(training, checkpoints, fields, config_class(task.kind))


def check_training(setup: Setup) -> None:
    """Find what would stop the training of a stage that is left, before anything is measured, and warn of what it would
    learn little by.

    Raises:
        ConfigError: the arguments, the optimizer, the schedule or the data loader cannot be made.
    """
    needs_momentum = any(method.needs_momentum for method in setup.methods)
    # an engine is checked by itself, where it is
    alone = replace(setup, training=[one.model_copy(update={"engine": None}) for one in setup.training])
    for stage, steps in zip(setup.stages, setup.steps, strict=True):
        if stage.index not in setup.past.finished:
            args = arguments(alone, stage, Path("checkpoint"))
            if stage.tasks[0].kind == "kto":
                check_mismatched(stage.tasks[0].name, args)
            check_settings(args, steps, needs_momentum)
            warn_of_steps(setup, stage, args)
    warn_of_pitfalls(setup)


def stage_seed(seed: int, stage: int) -> int:
    """The seed of a stage's TrainingArguments, below 2^32.

    Trainer shuffles the epochs of a stage with it, it + 1, ...; no two stages of a run share one of these.
    """
    plain = seed * 1_000_000 + stage * 1000
    if plain < 2**32 - 1_000_000:
        return plain
    start = random.Random(f"stages of seed {seed}").randrange(2**32 - 2_000_000)
    return start + stage * 1000


class StageWatch(Watch):
    """Watches a stage: its curves are measured, and may end it."""

    def __init__(self, trainer: Any, title: str, events: Path, stage: PlannedStage, around: Around):
        super().__init__(trainer, title, events, around.progress, around.interrupt, around.followers, around.later)
        self.stage, self.curves = stage, around.curves

    def after_step(self, step: int, last: bool) -> bool:
        if not last and self.curves.due(step):
            with self.trainer.cost.aside():
                self.curves.measure(step)
        return self.curves.stopped is not None

    def event(self, step: int) -> dict[str, Any]:
        return {"stage": self.stage.index, "task": self.stage.name, "step": step}

    def shown(self) -> str:
        return "  ".join(filter(None, (self.note, self.curves.note)))
