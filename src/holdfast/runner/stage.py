"""One stage's training: TrainingArguments from the configuration, checkpoints, events, progress."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PrinterCallback, TrainerCallback, TrainingArguments

from holdfast.data.collate import Collator, pack
from holdfast.engines.process import Process
from holdfast.errors import ConfigError, Interrupted
from holdfast.records.directory import learned_stages
from holdfast.runner.plan import PlannedStage
from holdfast.training.arguments import training_arguments
from holdfast.training.checkpoint import newest_whole_checkpoint
from holdfast.training.trainer import ContinualTrainer

if TYPE_CHECKING:
    from holdfast.records.directory import RunDirectory
    from holdfast.runner.curves import Curves
    from holdfast.runner.setup import Setup
    from holdfast.system.interrupt import Interrupt
    from holdfast.system.progress import Bar, Progress


def train_stage(
    setup: Setup,
    stage: PlannedStage,
    directory: RunDirectory,
    model: Any,
    states: Path | None,
    progress: Progress,
    interrupt: Interrupt,
    curves: Curves,
) -> dict[str, Any]:
    """Train a stage from its newest whole checkpoint, or from its start.

    Args:
        states: where the methods' states were loaded from, if that was since the last stage; they are read again once
            an engine has divided the model.

    Returns:
        for the stage's record: ``steps`` (optimizer steps), what they cost (:meth:`.Cost.state`),
        and ``stopped_early``, where the general loss ended the stage.

    Raises:
        Interrupted: the run was asked to stop; a checkpoint is saved.
    """
    rows: list[dict[str, Any]] = []
    origins: list[tuple[str, int]] = []
    for task in stage.tasks:
        for row in setup.rows[task.name]:
            origins.append((task.train[0].file, row["row"] + 1))
            rows.append(row | {"row": len(rows)})
    checkpoints = directory.stage(stage.index, stage.name) / "checkpoint"
    process = directory.process
    checkpoint = process.broadcast(newest_whole_checkpoint(checkpoints) if process.main else None)
    step = int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0
    directory.trim_events(stage.index, step)
    trainer = ContinualTrainer(
        model=model,
        args=arguments(setup, stage, checkpoints),
        train_dataset=pack(rows, setup.max_length) if setup.config.data.packing else rows,
        data_collator=Collator(setup.encoder.tokenizer.pad_token_id),
        method=setup.applied,
        task=stage.name,
        states=states,
        stage_index=len(learned_stages(directory.record, stage.index - 1)) + 1,
        rows=rows,
        folder=directory.path / "rehearsal",
        tokenizer=setup.encoder.tokenizer,
        describe_rows=lambda places: rows_by_file([origins[place] for place in places]),
    )
    trainer.remove_callback(PrinterCallback)
    title = f"stage {stage.index}/{len(setup.stages)} {stage.name}"
    if checkpoint:
        progress.line(f"{title}: continues from step {step}")
    with progress.bar(title) as bar:
        trainer.add_callback(_Watch(trainer, stage, directory.path / "events.jsonl", bar, interrupt, curves))
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if trainer.interrupted:
        raise Interrupted(f"stopped in {title} after step {trainer.state.global_step} of {trainer.state.max_steps}")
    stopped = {"stopped_early": curves.stopped} if curves.stopped else {}
    return {"steps": trainer.state.global_step} | trainer.cost.of_all(process) | stopped


def rows_by_file(rows: list[tuple[str, int]]) -> str:
    """(file, row) pairs for a message: ``train.json rows 3, 7; other.json rows 1``."""
    files: dict[str, list[int]] = {}
    for file, row in sorted(rows):
        files.setdefault(file, []).append(row)
    return "; ".join(f"{file} rows {', '.join(map(str, numbers))}" for file, numbers in files.items())


def arguments(setup: Setup, stage: PlannedStage, checkpoints: Path) -> TrainingArguments:
    """TrainingArguments of a stage.

    Raises:
        ConfigError: a value is not one that transformers takes.
    """
    config = setup.config
    training = config.training
    world = Process.this().world
    micro = training.micro_batch_size or max(1, training.batch_size // world)
    if training.batch_size % (micro * world):
        raise ConfigError(
            f"training.batch_size: {training.batch_size} rows do not make whole micro-batches of {micro} rows for each "
            f"of {world} processes; a multiple of {micro * world} would"
        )
    epochs = training.epochs[stage.index - 1] if isinstance(training.epochs, list) else training.epochs
    return training_arguments(
        training,
        checkpoints,
        num_train_epochs=epochs,
        max_steps=training.max_steps or -1,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=training.batch_size // (micro * world),
        lr_scheduler_type=training.schedule,
        warmup_steps=training.warmup,
        optim=training.optimizer,
        # Epochs of a stage shuffle with seed, seed + 1, ..., so stages are kept apart.
        seed=config.seed * 1_000_000 + stage.index * 1000,
    )


class _Watch(TrainerCallback):
    """Writes events, moves the progress bar, measures the curves, and turns a signal into a checkpoint and a stop."""

    def __init__(self, trainer: Any, stage: PlannedStage, events: Path, bar: Bar, interrupt: Interrupt, curves: Curves):
        self.trainer, self.stage, self.events, self.bar = trainer, stage, events, bar
        self.interrupt, self.curves = interrupt, curves
        self.process = trainer._process
        self.note = ""
        self.tokens, self.seconds = 0, 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.tokens, self.seconds = self.trainer.cost.tokens, self.trainer.cost.seconds

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        last = state.global_step >= state.max_steps
        if not last and self.curves.due(state.global_step):
            with self.trainer.cost.aside():
                self.curves.measure(state.global_step)
        note = "  ".join(filter(None, (self.note, self.curves.note)))
        self.bar.update(state.global_step, note, total=state.max_steps)
        if self.curves.stopped:
            # No checkpoint lies beyond this step, so that a killed stage comes here again and stops again.
            last = control.should_training_stop = True
            control.should_save = False
        if self.process.any_of(self.interrupt.requested) and not last:
            self.trainer.interrupted = True
            control.should_save = control.should_training_stop = True
        if control.should_save or last:
            control.should_log = True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if not logs or "loss" not in logs or not self.process.main:
            return
        terms = {key.removeprefix("term/"): value for key, value in logs.items() if key.startswith("term/")}
        seconds, tokens = self.trainer.cost.seconds, self.trainer.cost.tokens
        event = {
            "stage": self.stage.index,
            "task": self.stage.name,
            "step": state.global_step,
            "loss": logs["loss"],
            "terms": terms,
            "learning_rate": logs["learning_rate"],
            "grad_norm": logs.get("grad_norm"),
            "tokens_per_second": round((tokens - self.tokens) / (seconds - self.seconds), 1),
        }
        self.tokens, self.seconds = tokens, seconds
        with self.events.open("a", encoding="utf-8") as file:
            file.write(json.dumps(event) + "\n")
        shown = {"loss": logs["loss"]} | {name: value for name, value in terms.items() if len(terms) > 1}
        self.note = "  ".join(f"{name} {value:.3f}" for name, value in shown.items())
