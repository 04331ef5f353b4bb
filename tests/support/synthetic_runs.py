"""Run directories made of invented figures and nasty texts, to test what reads them."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from holdfast.config.run import load_config
from holdfast.metrics.summary import by_task, clipped_backward_transfer, summarize
from holdfast.system.files import write_json, write_jsonl

NASTY = (
    "</script><script>window.attacked = true</script>",
    '<img src=x onerror="window.attacked = true"> & <b>bold</b> {{ 7 * 7 }} {% raw %}',
    "emoji 🪸🌊👩‍🔬, maths ∑𝛼ᵢ, a line\u2028separator and a \x00 byte",
    "مرحبا بالعالم، هذا نص من اليمين إلى اليسار 2024",
    "שלום עולם \u202e reversed override",
    "",
    "one " * 4000 + "THE-END",
    "x" * 3000,
    "line one\n    line two, indented\n\tline three",
)
TASKS = ["2022", "2023", "2024/spring", "<b>2025</b> & later"]
STAGES = len(TASKS)


def accuracy(method: str, t: int, j: int, T: int, rng: random.Random) -> float:
    """An invented accuracy of task j (from 0) of T after stage t; of the method "unlearned" always 0."""
    if method == "unlearned":
        return 0.0
    learned = T if method == "joint" else j + 1
    if t < learned:
        return 0.02 + 0.03 * rng.random()
    keep = {"sequential": 0.45, "replay": 0.9, "joint": 1.0}.get(method, 0.8)
    return (0.86 - 0.04 * (j % 12)) * keep ** (t - learned)


def make_run(
    path: Path,
    method: str = "sequential",
    *,
    seed: int = 0,
    metrics: list[str] | None = None,
    rows: int = 12,
    events: int = 40,
    tasks: list[str] = TASKS,
    finished: bool = True,
    respond: Callable[[Path, float], float] | None = None,
    **config: Any,
) -> Path:
    """Write a run's directory.

    Args:
        metrics: one a task; accuracy where absent.
        respond: writes a file of responses of about an accuracy, and gives their score; invented ones where absent.
    """
    rng = random.Random(f"{method}/{seed}")
    metrics = metrics or ["accuracy"] * len(tasks)
    T = len(tasks)
    resolved = load_config(
        {
            "model": "models/tiny",
            "tuner": "lora",
            "method": [
                {
                    "name": "sequential" if method == "unlearned" else method,
                    **({"ratio": 0.25} if method == "replay" else {}),
                }
            ],
            "stream": {"path": "data/<i>years</i>"},
            "seed": seed,
            "output": str(path),
        }
        | config
    ).model_dump(mode="json")
    measured = [0, T] if method == "joint" else [*range(T + 1)] if finished else [0, 1]
    scores: list[list[float | None]] = []
    for t in range(T + 1):
        if t not in measured:
            scores.append([None] * T)
            continue
        line: list[float | None] = []
        folder = _folder(t, method, tasks)
        for j, task in enumerate(tasks):
            chance = accuracy(method, t, j, T, rng)
            file = path / "stages" / folder / "responses" / f"{_file(task)}.jsonl"
            if respond is not None:
                line.append(respond(file, chance))
                continue
            if metrics[j] in ("loss", "perplexity"):
                lines = [
                    {"row": row, "score": 4 * (1 - chance), "nats": 28 * (1 - chance), "tokens": 7}
                    for row in range(rows)
                ]
            else:
                lines = [_response(row, chance, rng, metrics[j]) for row in range(rows)]
            write_jsonl(file, lines)
            line.append(sum(entry["score"] for entry in lines) / rows)
        scores.append(line)
    general: dict[str, list[float | None]] = {
        "lasting facts": [max(0.0, 0.62 - 0.05 * t) if t in measured else None for t in range(T + 1)],
        "perplexity/held-out": [9.5 + 4 * t if t in measured else None for t in range(T + 1)],
    }
    named = dict(zip(tasks, metrics, strict=True))
    summary = summarize(scores, metrics=named, general=general)
    around = {key: None if value is None else [value - 0.05, value + 0.04] for key, value in summary.items()}
    joint = scores[T] if method == "joint" else None
    matrix = {
        "clipped_backward_transfer": clipped_backward_transfer(scores, metrics=named),
        "by_task": by_task(scores, metrics=named),
        "tasks": tasks,
        "metrics": named,
        "scores": scores,
        "general": general,
        "joint": joint,
        "summary": summary,
    }
    write_json(path / "matrix.json", matrix | {"intervals": around})
    write_json(path / "run.json", _info(resolved, named, rows, finished))
    stages = [1] if method == "joint" else [t for t in measured if t]
    write_jsonl(
        path / "events.jsonl",
        [
            _event(stage, "joint" if method == "joint" else tasks[stage - 1], step, method, rng)
            for stage in stages
            for step in range(10, 10 * events + 1, 10)
        ],
    )
    return path


def _folder(t: int, method: str, tasks: list[str]) -> str:
    if t == 0:
        return "00-start"
    return "01-joint" if method == "joint" else f"{t:02d}-{_file(tasks[t - 1])}"


def _file(task: str) -> str:
    return task.replace("/", "_")


def _response(row: int, chance: float, rng: random.Random, metric: str) -> dict[str, Any]:
    right, answer = rng.random() < chance, f"answer {row}"
    text = NASTY[row % len(NASTY)]
    value = float(right) if metric == "accuracy" else round(0.6 * right + 0.4 * rng.random(), 3)
    response = answer if right else NASTY[(row + 3) % len(NASTY)]
    return {"row": row, "prompt": f"Who? {text}", "answer": answer, "response": response, "score": value}


def _event(stage: int, task: str, step: int, method: str, rng: random.Random) -> dict[str, Any]:
    own = 0.3 + 2.5 * math.exp(-step / 90) + 0.1 * rng.random()
    terms = {"task": own} | ({"replay": 0.5 + 0.2 * rng.random()} if method == "replay" and stage > 1 else {})
    return {
        "stage": stage,
        "task": task,
        "step": step,
        "loss": sum(terms.values()),
        "learning_rate": 3e-4,
        "grad_norm": 0.7,
        "tokens_per_second": 1234.5,
        "terms": terms,
    }


def _info(config: dict[str, Any], metrics: dict[str, str], rows: int, finished: bool) -> dict[str, Any]:
    return {
        "config": config,
        "seed": config["seed"],
        "versions": {"holdfast": "0.1.0", "python": "3.11.9", "torch": "2.13.0", "transformers": "5.3.0"},
        "hardware": {"cpu": "An <Invented> CPU", "cores": 2, "memory_gib": 7.8, "gpus": []},
        "engine": "single",
        "commit": None,
        "tasks": {
            task: {
                "train": 1200,
                "test": rows,
                "metric": metric,
                "fingerprint": f"{i:064x}",
                "duplicate_train_rows": 3,
                "test_rows_in_train": i % 2,
            }
            for i, (task, metric) in enumerate(metrics.items())
        },
        "parameters": {"total": 1_060_000, "trainable": 65_536},
        "started": "2025-03-01T09:00:00+00:00",
        "finished": "2025-03-01T09:04:00+00:00" if finished else None,
        "seconds": {"train": 150.0, "evaluate": 42.0},
        "tokens": 250_000,
        "peak_memory_gib": 1.5,
    }
