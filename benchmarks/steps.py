"""What the benchmarks of training share: a clock of optimizer steps, arguments that leave all else out, a tokenizer."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast, TrainerCallback, TrainingArguments

from holdfast.system.device import on_gpu


def wall_time() -> float:
    """Seconds, once a GPU has done what it was given."""
    if on_gpu():
        torch.accelerator.synchronize()
    return time.perf_counter()


def busy_time() -> float:
    """Seconds of the processor, on which other work counts little; where there is a GPU, as :func:`wall_time`."""
    return wall_time() if on_gpu() else time.process_time()


class Clock(TrainerCallback):
    """Seconds of every optimizer step but the first, which warms up.

    Args:
        now: the clock.
    """

    def __init__(self, now: Callable[[], float] = busy_time) -> None:
        self.now = now
        self.seconds: list[float] = []
        self._last: float | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        at = self.now()
        if self._last is not None:
            self.seconds.append(at - self._last)
        self._last = at


def arguments(folder: Path | str, rows: int, steps: int, **more: Any) -> TrainingArguments:
    """Arguments of a training of so many timed steps, and one before them."""
    return TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=rows,
        max_steps=steps + 1,
        save_strategy="no",
        logging_steps=100,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        **more,
    )


def tokenizer() -> PreTrainedTokenizerFast:
    """One that trainers ask for and nothing is tokenised with."""
    words = Tokenizer(WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>")
