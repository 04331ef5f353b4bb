"""Tokens a second of pretraining, going on, and going on with self-generated replay, beside plain Trainer in one run.

usage: python benchmarks/lab.py [--size small|large] [--rounds 3] [--steps 8] [--only NAME ...] [--busy]
                                [--against-jax FOLDER]

small is width 128, 4 layers, heads of 32, context 128, vocabulary 4096, 32 sequences a step; large, width 512, 8
layers, heads of 64, the rest the same. Tokens are those of the task: 4,096 a step. Every variant has its turn in each
round. The first steps, in which things are compiled, do not count; of the others the median does, with replay the mean.
Replay draws 16 samples a step, in buffers of 8 steps, so a turn spans whole buffers.

FOLDER is a checkout of the published code of "Forgetting in Language Models" (github.com/martin-marek/forgetting, of
which 5cde463 was tried). JAX is installed into an environment of its own, and the published train step and sampler have
their turns after ours: the same width, depth, heads, number of weights, sequences, context and cores. Their blocks have
an ungated feed-forward layer of four times the width; ours a gated one of 8/3.

Time is the clock's on all cores, or with --busy the processor's on one core, for a machine with other work.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from steps import busy_time, wall_time
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
HERE = Path(__file__).resolve().parent
VOCAB, CONTEXT, BATCH, REPLAYED, BUFFER = 4096, 128, 32, 16, 8
WARM = 2
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
JAX = ["jax==0.10.2", "optax==0.2.8", "omegaconf==2.3.0", "tqdm==4.67.1"]
"""What the published train step needs, of the versions that it was tried with."""


def replay(name: str) -> dict[str, Any]:
    """A method of self-generated replay at the published sizes."""
    return {"name": name, "count": REPLAYED, "buffer": BUFFER, "domain": "text", "weight": 10}


VARIANTS: dict[str, dict[str, Any]] = {
    "plain Trainer, float32": {"plain": True, "precision": "float32"},
    "plain Trainer": {"plain": True},
    "plain loop, compiled": {"loop": True},
    "pretrain, float32": {"precision": "float32"},
    "pretrain": {},
    "pretrain, compiled": {"compile": True},
    "go on": {"start": True},
    "ntp_pre": {"start": True, "method": replay("ntp_pre")},
    "kl_pre": {"start": True, "method": replay("kl_pre")},
}


class Clock(TrainerCallback):
    """Seconds of each optimizer step after the first ones, and of parts of these."""

    def __init__(self, now: Callable[[], float] = wall_time) -> None:
        self.now = now
        self.steps: list[float] = []
        self.parts: dict[str, float] = {}
        self._last = 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.tick(state.global_step)

    def tick(self, step: int) -> None:
        """A step, counted from 1, has ended."""
        now = self.now()
        if step > WARM:
            self.steps.append(now - self._last)
        else:
            self.parts = {}
        self._last = now

    @contextmanager
    def count(self, owner: Any, name: str, part: str) -> Iterator[None]:
        """Inside, the time in a function counts for a part."""
        original = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            started = self.now()
            try:
                return original(*args, **kwargs)
            finally:
                self.parts[part] = self.parts.get(part, 0.0) + self.now() - started

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


def loop(tokens: Path, size: dict[str, Any], steps: int, precision: str, clock: Clock) -> None:
    """A loop of torch alone around the compiled model."""
    file = TokenFile.open(tokens)
    rows = torch.tensor([file.rows(CONTEXT)[i]["input_ids"] for i in range(BATCH)])
    model = new_model(SizeConfig(**size), file.tokenizer(), CONTEXT, 0).to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    compiled, batch = torch.compile(model), rows.to(DEVICE)
    for step in range(1, steps + 1):
        with torch.autocast(DEVICE, torch.bfloat16, enabled=precision == "bfloat16"):
            compiled(input_ids=batch, labels=batch, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        clock.tick(step)


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


class Published:
    """The published code, which waits in a process of its own for its turns.

    Args:
        code: a checkout of it.
        folder: of the environment that it runs in, which is made where it is missing.
        busy: whether seconds are the processor's.
    """

    def __init__(self, code: Path, folder: Path, size: dict[str, Any], busy: bool):
        python, installed = folder / "bin" / "python", folder / "installed.txt"
        if not installed.exists() or installed.read_text(encoding="utf-8").split() != JAX:
            subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
            subprocess.run([str(python), "-m", "pip", "install", "--quiet", *JAX], check=True)
            installed.write_text("\n".join(JAX), encoding="utf-8")
        shape = size | {"vocab": VOCAB, "context": CONTEXT, "batch": BATCH, "replayed": REPLAYED, "buffer": BUFFER}
        command = [str(python), str(HERE / "published.py"), str(code), json.dumps(shape), "busy" if busy else "wall"]
        environment = os.environ | {"JAX_PLATFORMS": "cpu"}
        self.process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )

    def seconds(self, precision: str, method: str | None, steps: int) -> list[float]:
        """Seconds of so many steps, in which nothing is compiled."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps({"precision": precision, "method": method, "steps": steps}) + "\n")
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"the published code ended with exit code {self.process.wait()}")
        found: list[float] = json.loads(line)
        return found


def table(seconds: dict[str, list[float]], published: dict[str, list[float]]) -> list[str]:
    """Lines of speeds and ratios, in Markdown; of each side the seconds a step, round by round."""
    columns = ["variant", "task tokens/s", "time / plain Trainer"]
    columns += ["published JAX, tokens/s", "speed / published JAX (min..max)"] if published else []
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for name, values in seconds.items():
        ratio = statistics.median(v / b for v, b in zip(values, seconds["plain Trainer"], strict=True))
        cells = [name, f"{BATCH * CONTEXT / statistics.median(values):,.0f}", f"{ratio:.2f}"]
        if published:
            theirs = published[name]
            ratios = [b / v for v, b in zip(values, theirs, strict=True)]
            cells.append(f"{BATCH * CONTEXT / statistics.median(theirs):,.0f}")
            cells.append(f"{statistics.median(ratios):.2f} ({min(ratios):.2f}..{max(ratios):.2f})")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main() -> None:
    """Print one line a variant, and the shares of a step with replay."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--rounds", type=int, default=3, help="how often every variant has its turn")
    parser.add_argument("--steps", type=int, default=8, help="counted steps in a turn")
    parser.add_argument("--only", nargs="*", choices=VARIANTS, metavar="NAME", help="only these, and plain Trainer")
    parser.add_argument("--busy", action="store_true", help="processor time on one core")
    parser.add_argument("--against-jax", type=Path, metavar="FOLDER", help="a checkout of the published code")
    parser.add_argument(
        "--jax-env",
        type=Path,
        metavar="FOLDER",
        default=HERE.parent / "build" / "jax",
        help="environment that JAX is installed into",
    )
    options = parser.parse_args()
    if options.against_jax and not (options.against_jax / "train_single.py").exists():
        parser.error(f"--against-jax: {options.against_jax} is no checkout of the published code: no train_single.py")
    if options.busy:
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})  # also of the processes that it starts
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    size, progress = SIZES[options.size], Progress(quiet=True)
    now = busy_time if options.busy else wall_time
    jax = Published(options.against_jax, options.jax_env, size, options.busy) if options.against_jax else None
    chosen = {k: v for k, v in VARIANTS.items() if not options.only or k in options.only or k == "plain Trainer"}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        tokens = make_tokens(folder)
        lab(tokens, size, 1, {}, folder / "start", Clock(), progress)
        seconds: dict[str, list[float]] = {name: [] for name in chosen}
        parts: dict[str, list[dict[str, float]]] = {name: [] for name in chosen}
        published: dict[str, list[float]] = {name: [] for name in chosen if jax}
        for turn in range(options.rounds):
            theirs: dict[tuple[str, str | None], float] = {}
            for number, (name, spec) in enumerate(chosen.items()):
                clock, output = Clock(now), folder / f"{turn}-{number}"
                counted = -(-options.steps // BUFFER) * BUFFER if "method" in spec else options.steps
                steps, precision = WARM + counted, spec.get("precision", "bfloat16")
                if spec.get("plain"):
                    plain(tokens, size, steps, precision, output, clock)
                elif spec.get("loop"):
                    loop(tokens, size, steps, precision, clock)
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
                if jax:
                    kind = precision, spec.get("method", {}).get("name")
                    if kind not in theirs:
                        theirs[kind] = mean(jax.seconds(*kind, counted))
                    published[name].append(theirs[kind])
                beside = f", published JAX {published[name][-1]:.3f} s" if jax else ""
                print(f"{turn + 1} {name}: {seconds[name][-1]:.3f} s a step{beside}", file=sys.stderr)
    measured = "processor time, " if options.busy else ""
    print(f"{options.size}, torch {torch.__version__}, {measured}", end="")
    print(f"{torch.get_num_threads()} threads, {options.rounds} rounds\n")
    print("\n".join(table(seconds, published)) + "\n")
    for name, found in parts.items():
        if "method" in VARIANTS[name]:
            shares = {part: statistics.median(turn.get(part, 0.0) for turn in found) for part in found[0]}
            shares["student"] = 1 - sum(shares.values())
            print(f"{name}: " + ", ".join(f"{part} {share:.0%}" for part, share in shares.items()))


if __name__ == "__main__":
    main()
