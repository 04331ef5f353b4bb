"""Watches the training of a run or a laboratory run: progress, events.jsonl, checkpoints, and when to stop."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from transformers import PrinterCallback, TrainerCallback

from holdfast.engines.process import Process
from holdfast.errors import Interrupted
from holdfast.records.follow import Followers
from holdfast.system.files import append_jsonl
from holdfast.system.interrupt import Interrupt
from holdfast.system.progress import Bar, Later, Progress
from holdfast.training.checkpoint import newest_whole_checkpoint


def checkpoint_to_continue(folder: Path) -> tuple[Path | None, int]:
    """The newest complete checkpoint below a folder, and its step; the same on every rank. (None, 0): there is none."""
    process = Process.this()
    checkpoint = process.broadcast(newest_whole_checkpoint(folder) if process.main else None)
    return checkpoint, _step(checkpoint) if checkpoint else 0


class Watch(TrainerCallback):
    """Runs a trainer. After each step it shows the progress, and stops training if the run is done or a signal came.
    Until the first step is done, long work stops by itself.

    A signal to one rank stops all of them at the same step, with one complete checkpoint: a rank that stopped alone
    would wait for ever in a collective that the others never join.

    Each kind of run has a subclass, which measures, says when the run is done, and begins the lines of events.jsonl.

    Args:
        trainer: a continual trainer.
        title: of the training, for the progress and for messages.
        events: the file that gets a line for each logged step.
        followers: the trackers, which get the same line.
        later: what follows this training; None: nothing.
    """

    def __init__(
        self,
        trainer: Any,
        title: str,
        events: Path,
        progress: Progress,
        interrupt: Interrupt,
        followers: Followers,
        later: Later | None = None,
    ):
        self.later = later
        self.trainer, self.title, self.events, self.followers = trainer, title, events, followers
        self.progress, self.interrupt = progress, interrupt
        self.process = Process.this()
        self.note = ""  # the last logged loss
        self._bar: Bar | None = None
        self._tokens, self._seconds = 0, 0.0  # at the last event

    def after_step(self, step: int, last: bool) -> bool:
        """Measure what is due, and return whether training ends here, without a checkpoint; the same on every rank."""
        raise NotImplementedError

    def event(self, step: int) -> dict[str, Any]:
        """The first fields of a line of events.jsonl."""
        raise NotImplementedError

    def tokens(self, step: int) -> int:
        """Tokens trained on until a step; tokens_per_second follows from them."""
        return self.trainer.cost.tokens

    def steps(self, most: int) -> int | None:
        """Steps of the whole training; None if nobody knows. ``most`` is the trainer's limit."""
        return most

    def shown(self) -> str:
        """The text beside the progress bar."""
        return self.note

    def train(self, checkpoint: Path | None) -> int:
        """Train from a checkpoint, or from the start, and return the last step.

        Raises:
            Interrupted: a rank was asked to stop; a complete checkpoint is saved, or no step was done since the last.
        """
        trainer, start = self.trainer, _step(checkpoint) if checkpoint else 0

        def check_stop() -> None:
            if trainer.state.global_step <= start and self.process.world == 1:  # else the others would wait for ever
                self.interrupt.check(f"in {self.title} before step {start + 1}")

        trainer._holdfast.check_stop = check_stop
        trainer.remove_callback(PrinterCallback)
        if checkpoint:
            self.progress.line(f"{self.title}: continues from step {start}")
        with self.progress.bar(self.title) as self._bar:
            trainer._holdfast.show = self._bar.part
            trainer.add_callback(self)
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        step = trainer.state.global_step
        if trainer.interrupted:
            self.process.wait()  # until rank 0 has written the checkpoint: launchers kill all ranks once one has left
            steps = self.steps(trainer.state.max_steps)
            of = f" of {steps}" if steps else ""
            raise Interrupted(f"stopped in {self.title} after step {step}{of}; all of it is saved")
        return step

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._tokens, self._seconds = self.tokens(state.global_step), self.trainer.cost.seconds

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step, last = state.global_step, state.global_step >= state.max_steps
        done = self.after_step(step, last)
        assert self._bar is not None
        self._bar.update(step, self.shown(), total=self.steps(state.max_steps), later=self.later)
        if done:  # no checkpoint here: a killed run goes on before this step, and is done here again
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
            **_kept(logs),
            **self._watched(),
            "learning_rate": logs["learning_rate"],
            "grad_norm": logs.get("grad_norm"),
            "tokens_per_second": round((tokens - self._tokens) / max(seconds - self._seconds, 1e-9), 1),
        }
        self._tokens, self._seconds = tokens, seconds
        append_jsonl(self.events, event)
        with self.trainer.cost.aside() if self.followers else contextlib.nullcontext():
            self.followers.line(self.events, event)
        shown = {"loss": logs["loss"]} | (terms if len(terms) > 1 else {})
        self.note = "  ".join(f"{name} {value:.3f}" for name, value in shown.items())

    def _watched(self) -> dict[str, dict[str, float]]:
        """``watched``: what methods say beside their terms, but for a budget, which :func:`_kept` has."""
        found = {name: value for method in self.trainer._holdfast.methods for name, value in method.watched().items()}
        own = {name: value for name, value in found.items() if not name.startswith("keep/")}
        return {"watched": own} if own else {}


def _kept(logs: dict[str, Any]) -> dict[str, dict[str, dict[str, float]]]:
    """``keep``: of each constraint of a budget, what was lost, the budget, the multiplier and the weight."""
    constraints: dict[str, dict[str, float]] = {}
    for key, value in logs.items():
        if key.startswith("keep/"):
            title, _, what = key.removeprefix("keep/").rpartition("/")
            constraints.setdefault(title, {})[what] = value
    return {"keep": constraints} if constraints else {}


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])
