"""The demo with pictures: a small vision-language model is trained from scratch, then learns three rooms of gallery."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console

from holdfast.config.run import load_config
from holdfast.data.streams.gallery.questions import Row
from holdfast.data.streams.gallery.stream import general_rows, room_rows
from holdfast.errors import ConfigError
from holdfast.lab.demo import compared, run_methods
from holdfast.lab.seeing import CONTEXT, make_seeing_model
from holdfast.runner.run import run
from holdfast.system.files import whole_folder, write_jsonl
from holdfast.system.progress import Progress

SIZE, ROOMS = 60, 3
"""Of gallery: train rows of each kind of question in a room, and rooms."""
PRETRAINING = {"one": ((1,), 600, 3), "two": ((1, 2), 1000, 3)}
"""What the model learns first, by task: how many things a picture shows where one is asked for, rows of each kind of
question, and epochs. Pictures of one thing come first: from pictures of two it finds no shapes."""
TESTED = 20
"""Rows of each kind that the first stages are tested with."""
TRAINING = {
    "epochs": 8,
    "batch_size": 16,
    "learning_rate": 1e-3,
    "warmup": 0.1,
    "arguments": {"adam_beta2": 0.99},  # the gradients of a few hundred steps change fast
}
REPLAY = {"name": "replay", "capacity": 480, "ratio": 1.0}
GENERAL = {"name": "gere_kl", "ratio": 0.5, "weight": 1.0, "ce_weight": 0.0, "samples": 400, "max_tokens": CONTEXT}
"""Keeps the general ability: KL to the model before training, on questions that belong to no room."""
METHODS = compared(REPLAY, GENERAL)


def run_image_demo(output: Path, seed: int, console: Console) -> list[Path]:
    """Make the model, do the runs, print the table and write the page; what is there already is not done again.

    Args:
        output: gets ``model-SEED``, the run of each method, ``METHOD-SEED``, and ``report-SEED.html``.
        seed: of the gallery, the model and the runs.

    Returns:
        the runs' directories.

    Raises:
        UserError: Pillow is not installed; output cannot be written, or holds a demo of another seed.
        Interrupted: SIGINT or SIGTERM asked to stop; the same call continues.
    """
    if find_spec("PIL") is None:
        raise ConfigError("--images: reading pictures needs Pillow: pip install 'holdfast[images]'")
    return run_methods(output, seed, METHODS, pretrain, configuration, console)


def pretrain(folder: Path, seed: int, progress: Progress) -> None:
    """Train a small LLaVA from scratch on general questions about gallery's pictures.

    Args:
        folder: gets the model and its processor. Its rows and the run stay beside it, in ``pretrain-SEED``.
        seed: of the first weights, the rows and their order.

    Raises:
        UserError: the folder cannot be written.
        Interrupted: SIGINT or SIGTERM asked to stop; the same call continues.
    """
    work = folder.with_name(f"pretrain-{seed}")
    if not (work / "untrained").exists():
        rooms = room_rows(SIZE, ROOMS, seed)
        rows = [*general_rows(100, seed=seed), *(row for splits in rooms.values() for row in splits["train"])]
        make_seeing_model(work / "untrained", (f"{row.question} {row.answer}" for row in rows), seed)
    for name, (things, size, _) in PRETRAINING.items():
        for split, count in (("train", size), ("test", TESTED)):
            write_rows(work / "data", name, split, general_rows(count, split, seed, things))
    config = {
        "model": str(work / "untrained"),
        "tuner": {"name": "full", "target": "all"},
        "method": "sequential",
        "stream": {"tasks": [{"name": name, "path": str(work / "data" / name)} for name in PRETRAINING]},
        "training": TRAINING
        | {"epochs": [epochs for *_, epochs in PRETRAINING.values()], "batch_size": 32, "weight_decay": 0.1},
        "evaluation": {"batch_size": 128, "general": []},
        "seed": seed,
        "output": str(work / "run"),
    }
    progress.line("\ngeneral questions")
    run(load_config(config), progress)
    last = sorted((work / "run" / "stages").iterdir())[-1]
    with whole_folder(folder) as partial:
        shutil.copytree(last / "model", partial, dirs_exist_ok=True)


def write_rows(folder: Path, task: str, split: str, rows: Sequence[Row]) -> None:
    """Write a split of a task, and the pictures that it shows, each once, named by their content."""
    pictures = folder / "pictures"
    pictures.mkdir(parents=True, exist_ok=True)
    written = []
    for row in rows:
        content = row.drawing.file()
        file = pictures / f"{hashlib.sha256(content).hexdigest()[:20]}.bmp"
        if not file.exists():
            file.write_bytes(content)
        written.append({"image": f"../{pictures.name}/{file.name}", "prompt": row.question, "answer": row.answer})
    write_jsonl(folder / task / f"{split}.jsonl", written)


def configuration(model: Path, output: Path, seed: int, method: Any) -> dict[str, Any]:
    """A run of the demo."""
    general = model.with_name(f"pretrain-{seed}") / "data" / "two" / "train.jsonl"
    methods = method if isinstance(method, list) else [method]
    return {
        "model": str(model),
        "tuner": {"name": "full", "target": "all"},
        "method": [one | {"path": str(general)} if one is GENERAL else one for one in methods],
        "stream": {"name": "gallery", "options": {"size": SIZE, "rooms": ROOMS, "seed": seed}},
        "training": TRAINING,
        "evaluation": {"batch_size": 128},
        "seed": seed,
        "output": str(output),
    }
