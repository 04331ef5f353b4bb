"""A stream of an sft task and tasks of other kinds, and their rows."""

from __future__ import annotations

import json

from support.tiny import tiny_config, write_model, write_tasks

LETTERS = "abcdefgh"


def pair_rows(count=16, start=0):
    """The better answer is the prompt's first letter, the worse one its second."""
    pairs = [(a, b) for a in LETTERS for b in LETTERS if a != b][start : start + count]
    return [{"prompt": f"first: {a}{b}?", "chosen": a, "rejected": b} for a, b in pairs]


def judged_rows(count=6, start=0):
    return [
        {"prompt": row["prompt"], "completion": row[key], "label": key == "chosen"}
        for row in pair_rows(count, start)
        for key in ("chosen", "rejected")
    ]


def rewarded_rows(count=8, start=0):
    return [{"prompt": row["prompt"], "answer": row["chosen"]} for row in pair_rows(count, start)]


MAKERS = {"dpo": pair_rows, "kto": judged_rows, "grpo": rewarded_rows}


def stream_of(folder, *kinds, **changes):
    """A run of an sft task and tasks of other kinds, whose files are made if they are not there."""
    if not (folder / "model").exists():
        write_model(folder / "model")
        write_tasks(folder / "tasks", ["red"], train=16)
    tasks = [{"name": "red", "path": str(folder / "tasks" / "red")}]
    for kind in kinds:
        make, place = MAKERS[kind], folder / "tasks" / kind
        place.mkdir(exist_ok=True)
        for split, rows in (("train", make()), ("test", make(4, 20))):
            (place / f"{split}.json").write_text(json.dumps(rows))
        options = {"num_generations": 4, "max_completion_length": 3} if kind == "grpo" else {"beta": 0.3}
        reward = {"reward": "exact_match"} if kind == "grpo" else {}
        tasks.append({"name": kind, "path": str(place), "kind": kind, "options": options} | reward)
    training = {"epochs": 1, "batch_size": 8, "micro_batch_size": 4, "learning_rate": 1e-2, "log_every": 1}
    return tiny_config(folder) | {
        "stream": {"tasks": tasks},
        "training": training | {"save_every": 1},
        "output": str(folder / "run"),
        **changes,
    }
