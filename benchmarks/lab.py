"""Tokens a second of pretraining, going on, and going on with self-generated replay, beside plain Trainer in one run.

usage: python benchmarks/lab.py [--size small|large] [--rounds 3] [--steps 8] [--only NAME ...]

small is width 128, 4 layers, heads of 32, context 128, vocabulary 4096, 32 sequences a step; large, width 512, 8
layers, heads of 64, the rest the same. Tokens are those of the task: 4,096 a step. Every variant has its turn in each
round. The first steps, in which things are compiled, do not count; of the others the median does, with replay the mean.
Replay draws 16 samples a step, in buffers of 8 steps, so a turn spans whole buffers.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from holdfast.data.streams.chronicle.stream import general_text
from holdfast.data.tokens.file import TokenFile, build_tokens
from holdfast.lab.config import SizeConfig
from holdfast.lab.model import new_model
from holdfast.lab.pretrain import InOrder, LabTrainer, pretrain
from holdfast.lab.tokenizer import train_tokenizer
from holdfast.rehearsal import buffer, teacher
from holdfast.system.progress import Progress

SIZES: dict[str, dict[str, Any]] = {
    "small": {"width": 128, "depth": 4, "head_size": 32},
    "large": {"width": 512, "depth": 8, "head_size": 64},
}
VOCAB, CONTEXT, BATCH, REPLAYED, BUFFER = 4096, 128, 32, 16, 8
WARM = 2
PUBLISHED = {"pretrain": 5100, "go on": 5100, "ntp_pre": 2020, "kl_pre": 1910}
"""Tokens/s of the published JAX code at the small size in bfloat16, on two cores with AVX-512 and AMX."""


def replay(name: str) -> dict[str, Any]:
    """A method of self-generated replay at the published sizes."""
    return {"name": name, "count": REPLAYED, "buffer": BUFFER, "domain": "text", "weight": 10}


VARIANTS: dict[str, dict[str, Any]] = {
    "plain Trainer, float32": {"plain": True, "precision": "float32"},
    "plain Trainer": {"plain": True},
    "pretrain, float32": {"precision": "float32"},
    "pretrain": {},
    "pretrain, compiled": {"compile": True},
    "go on": {"start": True},
    "ntp_pre": {"start": True, "method": replay("ntp_pre")},
    "kl_pre": {"start": True, "method": replay("kl_pre")},
}


class Clock(TrainerCallback):
    """Seconds of each optimizer step after the first ones, and of parts of these."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self.parts: dict[str, float] = {}
        self._last = 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        if state.global_step > WARM:
            self.steps.append(now - self._last)
        else:
            self.parts = {}
        self._last = now

    @contextmanager
    def count(self, owner: Any, name: str, part: str) -> Iterator[None]:
        """Inside, the time in a function counts for a part."""
        original = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return original(*args, **kwargs)
            finally:
                self.parts[part] = self.parts.get(part, 0.0) + time.perf_counter() - started

        setattr(owner, name, timed)
        try:
            yield
        finally:
            setattr(owner, name, original)


def make_tokens(folder: Path) -> Path:
    """A token file of 400,000 tokens, whose vocabulary is filled up to its size."""
    texts = general_text(size=400, seed=0)
    (folder / "text.txt").write_text("\n".join(texts), encoding="utf-8")
    known = len(train_tokenizer(texts, VOCAB, domains=["text"]))
    tokenizer = train_tokenizer(texts, VOCAB, domains=["text"], reserved=VOCAB - known) if known < VOCAB else None
    tokenizer = tokenizer or train_tokenizer(texts, VOCAB, domains=["text"])
    build_tokens([str(folder / "text.txt")] * 3, folder / "tokens", tokenizer, domain="text")
    return folder / "tokens"


def plain(tokens: Path, size: dict[str, Any], steps: int, precision: str, output: Path, clock: Clock) -> None:
    """transformers' Trainer on the same sequences."""
    file = TokenFile.open(tokens)
    args = TrainingArguments(
        output_dir=str(output),
        max_steps=steps,
        per_device_train_batch_size=BATCH,
        learning_rate=1e-3,
        optim="adamw_torch_fused",
        bf16=precision == "bfloat16",
        max_grad_norm=0.0,
        save_strategy="no",
        logging_steps=50,
        report_to="none",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    model = new_model(SizeConfig(**size), file.tokenizer(), CONTEXT, 0)
    trainer = Trainer(model, args, train_dataset=file.rows(CONTEXT), callbacks=[clock])
    trainer.remove_callback(PrinterCallback)
    trainer.train()


def lab(
    tokens: Path, size: Any, steps: int, spec: dict[str, Any], output: Path, clock: Clock, progress: Progress
) -> None:
    """The same by the laboratory."""
    config = {
        "model": size,
        "data": str(tokens),
        "context": CONTEXT,
        "method": spec.get("method", "sequential"),
        "training": {
            "batch_size": BATCH,
            "precision": spec.get("precision", "bfloat16"),
            "compile": spec.get("compile", False),
        },
        "stop": {"tokens": steps * BATCH * CONTEXT},
        "output": str(output),
    }
    make: Callable[..., None] = LabTrainer.__init__

    def with_clock(trainer: Any, *args: Any, **kwargs: Any) -> None:
        make(trainer, *args, **kwargs)
        trainer.add_callback(clock)

    LabTrainer.__init__ = with_clock
    try:
        pretrain(config, progress)
    finally:
        LabTrainer.__init__ = make


def main() -> None:
    """Print one line a variant, and the shares of a step with replay."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--rounds", type=int, default=3, help="how often every variant has its turn")
    parser.add_argument("--steps", type=int, default=8, help="counted steps in a turn")
    parser.add_argument("--only", nargs="*", choices=VARIANTS, metavar="NAME", help="only these, and plain Trainer")
    options = parser.parse_args()
    size, progress = SIZES[options.size], Progress(quiet=True)
    chosen = {k: v for k, v in VARIANTS.items() if not options.only or k in options.only or k == "plain Trainer"}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        tokens = make_tokens(folder)
        lab(tokens, size, 1, {}, folder / "start", Clock(), progress)
        seconds: dict[str, list[float]] = {name: [] for name in chosen}
        parts: dict[str, list[dict[str, float]]] = {name: [] for name in chosen}
        for turn in range(options.rounds):
            for number, (name, spec) in enumerate(chosen.items()):
                clock, output = Clock(), folder / f"{turn}-{number}"
                steps = WARM + (-(-options.steps // BUFFER) * BUFFER if "method" in spec else options.steps)
                if spec.get("plain"):
                    plain(tokens, size, steps, spec.get("precision", "bfloat16"), output, clock)
                else:
                    at = str(folder / "start" / "model") if spec.get("start") else size
                    with (
                        clock.count(buffer, "sample", "sampling"),
                        clock.count(teacher.HiddenTeacher, "sums", "teacher's head and KL"),
                        clock.count(InOrder, "get_batch_samples", "data"),
                    ):
                        lab(tokens, at, steps, spec, output, clock, progress)
                mean = statistics.mean if "method" in spec else statistics.median
                seconds[name].append(mean(clock.steps))
                parts[name].append({part: value / sum(clock.steps) for part, value in clock.parts.items()})
    print(f"{options.size}, torch {torch.__version__}, {torch.get_num_threads()} threads, {options.rounds} rounds\n")
    print("| variant | task tokens/s | time / plain Trainer | published JAX, tokens/s | ratio |")
    print("|---|---|---|---|---|")
    base = seconds["plain Trainer"]
    for name, values in seconds.items():
        rate = BATCH * CONTEXT / statistics.median(values)
        ratio = statistics.median(v / b for v, b in zip(values, base, strict=True))
        published = PUBLISHED.get(name) if options.size == "small" else None
        beside = f"{published:,} | {rate / published:.2f}" if published else "– | –"
        print(f"| {name} | {rate:,.0f} | {ratio:.2f} | {beside} |")
    print()
    for name, found in parts.items():
        if "method" in VARIANTS[name]:
            shares = {part: statistics.median(turn.get(part, 0.0) for turn in found) for part in found[0]}
            shares["student"] = 1 - sum(shares.values())
            print(f"{name}: " + ", ".join(f"{part} {share:.0%}" for part, share in shares.items()))


if __name__ == "__main__":
    main()
