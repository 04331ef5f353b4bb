"""The demo: a small model is pretrained on chronicle's general text, then learns four years with four methods."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from holdfast.config.run import load_config
from holdfast.data.streams.chronicle.stream import general_text
from holdfast.lab.small import pretrain_small
from holdfast.lab.tokenizer import train_tokenizer
from holdfast.report import write_report
from holdfast.report.terminal import print_table
from holdfast.runner.loop import run
from holdfast.system.progress import Progress

SIZE = 50  # facts of each year of the world
METHODS: dict[str, Any] = {
    "sequential": "sequential",
    "replay": {"name": "replay", "capacity": 600, "ratio": 1.0},
    "ewc": {"name": "ewc", "strength": 1e4},
    "joint": "joint",
}


def run_demo(output: Path, seed: int, console: Console) -> list[Path]:
    """Make the model, do the runs, print the table and write the page; what is there already is not done again.

    Args:
        output: gets ``model/``, a directory a method, and ``report.html``.
        seed: of the world, the model and the runs.

    Returns:
        the directories of the runs.

    Raises:
        UserError: output cannot be written, or holds a demo of another seed.
        Interrupted: SIGINT or SIGTERM asked to stop; the same call continues.
    """
    started = time.monotonic()
    progress = Progress()
    torch.set_num_threads(1)  # tensors this small gain little from two, and lose much where another process works
    model = output / f"model-{seed}"
    if not model.exists():
        make_model(model, seed, progress)
    runs = []
    for name, method in METHODS.items():
        progress.line(f"\n{name}")
        runs.append(output / f"{name}-{seed}")
        run(load_config(configuration(model, runs[-1], seed, method)), progress)
    page = write_report(runs, output / f"report-{seed}.html")
    print_table(runs, console)
    console.print(f"The page that compares them: {page}", soft_wrap=True)
    progress.line(f"All of it took {(time.monotonic() - started) / 60:.1f} minutes.")
    return runs


def make_model(folder: Path, seed: int, progress: Progress) -> None:
    """Train a tokenizer and a Llama of about a million parameters on chronicle's general text."""
    texts = general_text(size=SIZE, seed=seed)
    tokenizer = train_tokenizer(texts, vocab_size=2048, model_max_length=64)
    with progress.bar("pretrain a small Llama on general text") as bar:
        pretrain_small(texts, tokenizer, folder, seed=seed, on_step=lambda done, total: bar.update(done, total=total))


def configuration(model: Path, output: Path, seed: int, method: Any) -> dict[str, Any]:
    """A run of the demo."""
    return {
        "model": str(model),
        "tuner": "full",
        "method": method,
        "stream": {"name": "chronicle", "options": {"size": SIZE, "seed": seed}},
        "training": {"epochs": 8, "batch_size": 16, "learning_rate": 2e-3, "warmup": 0.1},
        "evaluation": {"batch_size": 128},
        "seed": seed,
        "output": str(output),
    }
