"""The demo: a small model is pretrained on chronicle's general text, then learns four years with five methods."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from holdfast.config.run import load_config
from holdfast.data.streams.chronicle.stream import general_text
from holdfast.data.tokens.file import build_tokens
from holdfast.lab.pretrain import pretrain
from holdfast.lab.tokenizer import train_tokenizer
from holdfast.report import write_report
from holdfast.report.terminal import print_table
from holdfast.runner.run import run
from holdfast.system.files import whole_folder, write_jsonl
from holdfast.system.progress import Progress

SIZE = 50  # facts of each year of the world
PRETRAINING: dict[str, Any] = {
    "model": {"width": 128, "depth": 4, "head_size": 32, "mlp_width": 384, "tie_embeddings": True},
    "context": 64,
    "training": {
        "batch_size": 8,
        "learning_rate": 4e-3,
        "schedule": "cosine",
        "warmup_tokens": 40_960,
        "weight_decay": 0.1,
        "max_grad_norm": 1.0,
    },
    "stop": {"tokens": 409_600},
}
"""Of `holdfast lab pretrain`: 800 steps, the first tenth of them warm-up."""

REPLAY = {"name": "replay", "capacity": 600, "ratio": 1.0}
GENERAL = {"name": "gere_kl", "ratio": 0.5, "weight": 0.1, "ce_weight": 0.0, "max_tokens": 64}
"""Keeps the general ability: KL to the model before training, on the text that it was pretrained on."""


def compared(replay: dict[str, Any], general: dict[str, Any]) -> dict[str, Any]:
    """The methods that a demo compares, by the names of their runs, with its settings of rehearsal."""
    return {
        "sequential": "sequential",
        "replay": replay,
        "replay+gere_kl": [replay, general],
        "ewc": {"name": "ewc", "strength": 1e4},
        "joint": "joint",
    }


METHODS = compared(REPLAY, GENERAL)


def run_demo(output: Path, seed: int, console: Console) -> list[Path]:
    """Make the model, do the runs, print the table and write the page; what is there already is not done again.

    Args:
        output: gets ``model-SEED``, the run of each method, ``METHOD-SEED``, and ``report-SEED.html``.
        seed: of the world, the model and the runs.

    Returns:
        the runs' directories.

    Raises:
        UserError: output cannot be written, or holds a demo of another seed.
        Interrupted: SIGINT or SIGTERM asked to stop; the same call continues.
    """
    return run_methods(output, seed, METHODS, make_model, configuration, console)


def run_methods(
    output: Path,
    seed: int,
    methods: dict[str, Any],
    make: Callable[[Path, int, Progress], None],
    configure: Callable[[Path, Path, int, Any], dict[str, Any]],
    console: Console,
) -> list[Path]:
    """Make a demo's model and do the runs of its methods; see :func:`run_demo`.

    Args:
        make: makes the model in a folder, from the seed.
        configure: the configuration of a run, from the model, the run's directory, the seed and the method.
    """
    started, progress = time.monotonic(), Progress()
    torch.set_num_threads(1)  # two help tensors this small little, and cost much while another process works
    model = output / f"model-{seed}"
    if not model.exists():
        make(model, seed, progress)
    configs = {name: configure(model, output / f"{name}-{seed}", seed, method) for name, method in methods.items()}
    return run_and_compare(configs, output / f"report-{seed}.html", started, progress, console)


def run_and_compare(
    configs: dict[str, dict[str, Any]], page: Path, started: float, progress: Progress, console: Console
) -> list[Path]:
    """Do the runs of a demo that are not done, print their table and write their page.

    Args:
        configs: of the runs, by the names that are shown.
        page: gets the comparison.
        started: when the demo began, by ``time.monotonic``.

    Returns:
        the runs' directories.
    """
    for name, config in configs.items():
        progress.line(f"\n{name}")
        run(load_config(config), progress)
    runs = [Path(config["output"]) for config in configs.values()]
    write_report(runs, page)
    print_table(runs, console)
    console.print(f"The page that compares them: {page}", soft_wrap=True)
    progress.line(f"All of it took {(time.monotonic() - started) / 60:.1f} minutes.")
    return runs


def make_model(folder: Path, seed: int, progress: Progress) -> None:
    """Pretrain a Llama of about a million parameters, with a tokenizer of its own, on chronicle's general text.

    Args:
        folder: gets the model and its tokenizer. The text, its token file and the laboratory run stay beside it, in
            ``pretrain-SEED``.
        seed: of the text, of the first weights and of the order of the text.

    Raises:
        UserError: the folder cannot be written.
        Interrupted: SIGINT or SIGTERM asked to stop; the same call continues.
    """
    work = folder.with_name(f"pretrain-{seed}")
    texts = general_text(size=SIZE, seed=seed)
    write_jsonl(work / "text.jsonl", [{"text": text} for text in texts])
    tokenizer = train_tokenizer(texts, vocab_size=2048, model_max_length=PRETRAINING["context"])
    build_tokens([work / "text.jsonl"], work / "tokens", tokenizer)
    run = work / "general-text"
    pretrain(PRETRAINING | {"data": str(work / "tokens"), "seed": seed, "output": str(run)}, progress)
    with whole_folder(folder) as partial:
        shutil.copytree(run / "model", partial, dirs_exist_ok=True)


def configuration(model: Path, output: Path, seed: int, method: Any) -> dict[str, Any]:
    """A run of the demo."""
    text = model.with_name(f"pretrain-{seed}") / "text.jsonl"
    methods = method if isinstance(method, list) else [method]
    return {
        "model": str(model),
        "tuner": "full",
        "method": [one | {"path": str(text)} if one is GENERAL else one for one in methods],
        "stream": {"name": "chronicle", "options": {"size": SIZE, "seed": seed}},
        "training": {"epochs": 8, "batch_size": 16, "learning_rate": 2e-3, "warmup": 0.1},
        "evaluation": {"batch_size": 128},
        "seed": seed,
        "output": str(output),
    }
