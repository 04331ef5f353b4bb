"""The curves of a stage: the scores of its tasks, and the loss on general text, while it trains."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from holdfast.engines.process import Process
from holdfast.records.follow import Followers
from holdfast.records.gate import Increase, general_loss
from holdfast.runner.plan import PlannedStage
from holdfast.system.files import append_jsonl


@dataclass
class Curves:
    """Measures at intervals, writes curves.jsonl, and notices when a general loss has risen beyond its limit.

    Attributes:
        path: curves.jsonl.
        every: steps between measurements of the stage's tasks; None: they are not measured.
        scores: measures the tasks, {task: score}.
        followers: the trackers, which get what is measured.
        general_every: steps between measurements of general text; None: it is not measured.
        general: measures general text, {name in matrix.json: value}.
        before: the values of ``general`` before training; None where a value was not finite.
        limit: on the rise of each general loss; None: there is no limit.
        note: the general losses, for the progress.
        stopped: the loss that was beyond the limit, for the stage's record; None: there was none so far.
    """

    path: Path
    stage: PlannedStage
    every: int | None
    scores: Callable[[], dict[str, float]]
    general_every: int | None
    general: Callable[[], dict[str, float]]
    before: Mapping[str, float | None]
    followers: Followers
    limit: Increase | None = None
    note: str = ""
    stopped: dict[str, Any] | None = None

    def due(self, step: int) -> bool:
        """Whether anything is measured after a step."""
        return any(every is not None and step % every == 0 for every in (self.every, self.general_every))

    def measure(self, step: int) -> None:
        """Measure what is due after a step, and leave the training's random state as it is."""
        line: dict[str, Any] = {"stage": self.stage.index, "task": self.stage.name, "step": step}
        with torch.random.fork_rng():
            if self.every is not None and step % self.every == 0:
                line["scores"] = self.scores()
            if self.general_every is not None and step % self.general_every == 0:
                line["general"] = self.general()
                self._compare(step, line["general"])
        if Process.this().main:
            append_jsonl(self.path, line)
            self.followers.line(self.path, line)

    def _compare(self, step: int, general: dict[str, float]) -> None:
        """Compare the general losses with those before training."""
        notes = []
        for name, value in general.items():
            loss, start = general_loss(name, value), self.before[name]
            before = math.nan if start is None else general_loss(name, start)
            notes.append(f"{name.removeprefix('perplexity/')} {loss:.3f} ({loss - before:+.3f})")
            if self.limit is None or self.stopped is not None or math.isnan(before):
                continue
            if not loss - before <= self.limit.nats(before):  # NaN is beyond any limit
                self.stopped = {
                    "step": step,
                    "general": name,
                    "loss": loss,
                    "before": before,
                    "limit": str(self.limit),
                }
        self.note = "  ".join(notes)
