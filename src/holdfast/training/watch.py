"""The training of a run or a laboratory run, watched: progress, events.jsonl, and what ends it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PrinterCallback, TrainerCallback

from holdfast.engines.process import Process
from holdfast.errors import Interrupted
from holdfast.system.files import append_jsonl
from holdfast.system.interrupt import Interrupt
from holdfast.system.progress import Bar, Progress
from holdfast.training.checkpoint import newest_whole_checkpoint


def checkpoint_to_continue(folder: Path) -> tuple[Path | None, int]:
    """The newest complete checkpoint below a folder, and its step; the same on every rank. (None, 0): there is none."""
    process = Process.this()
    checkpoint = process.broadcast(newest_whole_checkpoint(folder) if process.main else None)
    return checkpoint, _step(checkpoint) if checkpoint else 0


class Watch(TrainerCallback):
    """Trains; after each step, it shows progress and stops where the run is done or a signal came.

    All ranks decide together: a rank that stopped alone would wait in a collective that the others never join.
    A kind of run is a subclass, which says what is measured, when it is done, and what an event tells.

    Args:
        trainer: a continual trainer.
        title: of the training, for the progress and for messages.
        events: the file that gets a line a logged step.
    """

    def __init__(self, trainer: Any, title: str, events: Path, progress: Progress, interrupt: Interrupt):
        self.trainer, self.title, self.events = trainer, title, events
        self.progress, self.interrupt = progress, interrupt
        self.process = Process.this()
        self.note = ""  # the loss last logged
        self._bar: Bar | None = None
        self._tokens, self._seconds = 0, 0.0  # at the last event

    def after_step(self, step: int, last: bool) -> bool:
        """Measure what is due; whether training ends here, without a checkpoint. The same on every rank."""
        raise NotImplementedError

    def event(self, step: int) -> dict[str, Any]:
        """The first fields of a line of events.jsonl."""
        raise NotImplementedError

    def tokens(self, step: int) -> int:
        """Tokens trained on until a step, for tokens_per_second."""
        return self.trainer.cost.tokens

    def steps(self, most: int) -> int | None:
        """Steps of the whole training, of which the trainer takes ``most``; None where nobody knows."""
        return most

    def shown(self) -> str:
        """What the progress shows beside the step."""
        return self.note

    def train(self, checkpoint: Path | None) -> int:
        """Train from a checkpoint, or from the start; the step that training ended after.

        Raises:
            Interrupted: a rank was asked to stop; a complete checkpoint is saved.
        """
        trainer = self.trainer
        trainer.remove_callback(PrinterCallback)
        if checkpoint:
            self.progress.line(f"{self.title}: continues from step {_step(checkpoint)}")
        with self.progress.bar(self.title) as self._bar:
            trainer.add_callback(self)
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        step = trainer.state.global_step
        if trainer.interrupted:
            self.process.wait()  # for rank 0, which writes the checkpoint: a launcher ends the others when one has left
            steps = self.steps(trainer.state.max_steps)
            raise Interrupted(f"stopped in {self.title} after step {step}" + (f" of {steps}" if steps else ""))
        return step

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._tokens, self._seconds = self.tokens(state.global_step), self.trainer.cost.seconds

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step, last = state.global_step, state.global_step >= state.max_steps
        done = self.after_step(step, last)
        assert self._bar is not None
        self._bar.update(step, self.shown(), total=self.steps(state.max_steps))
        if done:  # a checkpoint beyond this step would hide it from a process that goes on
            control.should_training_stop, control.should_save = True, False
        elif self.process.any_of(self.interrupt.requested) and not last:
            self.trainer.interrupted = True
            control.should_training_stop = control.should_save = True
        control.should_log |= control.should_save or control.should_training_stop or last

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if not logs or "loss" not in logs or not self.process.main:
            return
        step, seconds = state.global_step, self.trainer.cost.seconds
        tokens = self.tokens(step)
        terms = {key.removeprefix("term/"): value for key, value in logs.items() if key.startswith("term/")}
        event = self.event(step) | {
            "loss": logs["loss"],
            "terms": terms,
            "learning_rate": logs["learning_rate"],
            "grad_norm": logs.get("grad_norm"),
            "tokens_per_second": round((tokens - self._tokens) / max(seconds - self._seconds, 1e-9), 1),
        }
        self._tokens, self._seconds = tokens, seconds
        append_jsonl(self.events, event)
        shown = {"loss": logs["loss"]} | (terms if len(terms) > 1 else {})
        self.note = "  ".join(f"{name} {value:.3f}" for name, value in shown.items())


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])
