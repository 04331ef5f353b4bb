"""`holdfast run` with its defaults beside plain Trainer in float32 and TRL's SFTTrainer with its defaults: time a step.

usage: python benchmarks/defaults.py --model FOLDER [--rounds 3] [--steps 3] [--tuner lora] [--busy]

One job for all sides: LoRA of rank 16 on every linear layer (or every weight), steps of 8 rows of a task, about 110
tokens each, of which the answer's 5 or so are supervised. Each side has what its users get who say no more: holdfast's
own command, with its evaluations left out of the time; plain Trainer on a model in float32; SFTTrainer with a model's
name, so that it chooses data types and recomputes activations. The sides have turns. Time is the clock's on all cores,
or with --busy the processor's of one thread, for a machine with other work.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from steps import Clock, arguments, busy_time, wall_time
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer
from transformers.trainer import DEFAULT_CALLBACKS
from trl import SFTConfig, SFTTrainer  # type: ignore[attr-defined]

import holdfast
from holdfast.data.collate import Collator
from holdfast.system.files import write_jsonl

ROWS, WORDS = 8, 45
NAMES = "amber birch cedar dune ember fjord grove heath inlet jetty knoll lagoon marsh nook oasis pier quay reef"


def task(folder: Path, rows: int) -> list[dict[str, str]]:
    """Write a task of random words and short answers."""
    chance = random.Random(0)
    made = [
        {
            "prompt": " ".join(chance.choices(NAMES.split(), k=WORDS)) + "?",
            "answer": " ".join(chance.choices(NAMES.split(), k=2)),
        }
        for _ in range(rows + 1)
    ]
    write_jsonl(folder / "train.jsonl", made[:rows])
    write_jsonl(folder / "test.jsonl", made[rows:])
    return made[:rows]


def lora() -> LoraConfig:
    return LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")


def ours(model: str, tuner: str, data: Path, steps: int, folder: Path) -> None:
    holdfast.run(
        {
            "model": model,
            "tuner": tuner,
            "stream": [{"name": "words", "path": str(data)}],
            "training": {"batch_size": ROWS, "max_steps": steps + 1},
            "evaluation": {"general": [], "shift": 0, "max_new_tokens": 1},
            "output": str(folder),
        }
    )


def plain(model: str, tuner: str, rows: list[Any], pad: int, steps: int, folder: Path) -> None:
    loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    trained = get_peft_model(loaded, lora()) if tuner == "lora" else loaded
    Trainer(trained, arguments(folder, ROWS, steps), train_dataset=rows, data_collator=Collator(pad)).train()


def trl(model: str, tuner: str, rows: list[dict[str, str]], steps: int, folder: Path) -> None:
    chats = [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "completion": [{"role": "assistant", "content": row["answer"]}],
        }
        for row in rows
    ]
    args = SFTConfig(
        output_dir=str(folder),
        per_device_train_batch_size=ROWS,
        max_steps=steps + 1,
        save_strategy="no",
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
    )
    SFTTrainer(
        model, args, train_dataset=Dataset.from_list(chats), peft_config=lora() if tuner == "lora" else None
    ).train()


def encoded(model: str, rows: list[dict[str, str]]) -> tuple[list[dict[str, list[int]]], int]:
    """The same rows as tokens, and the padding token."""
    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    made = []
    for row in rows:
        turns = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["answer"]}]
        asked = tokenizer.apply_chat_template(turns[:1], add_generation_prompt=True, return_dict=False)
        whole = tokenizer.apply_chat_template(turns, return_dict=False)
        made.append({"input_ids": whole, "labels": [-100] * len(asked) + whole[len(asked) :]})
    return made, tokenizer.pad_token_id


def main() -> None:
    """Print one line a side."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a causal language model with a chat template")
    parser.add_argument("--tuner", default="lora", choices=["lora", "full"])
    parser.add_argument("--rounds", type=int, default=3, help="how often each side has its turn")
    parser.add_argument("--steps", type=int, default=3, help="counted steps in a turn")
    parser.add_argument("--busy", action="store_true", help="processor time of one thread")
    options = parser.parse_args()
    torch.set_num_threads(1 if options.busy else len(os.sched_getaffinity(0)))
    transformers.utils.logging.set_verbosity_error()
    clock = Clock(busy_time if options.busy else wall_time)
    DEFAULT_CALLBACKS.append(clock)  # type: ignore[arg-type]
    with tempfile.TemporaryDirectory() as name:
        data = Path(name, "words")
        rows = task(data, ROWS * (options.steps + 1))
        tokens, pad = encoded(options.model, rows)
        shared = (options.model, options.tuner)
        sides: dict[str, Callable[[Path], None]] = {
            "plain Trainer, float32": lambda folder: plain(*shared, tokens, pad, options.steps, folder),
            "holdfast run": lambda folder: ours(*shared, data, options.steps, folder),
            "TRL SFTTrainer": lambda folder: trl(*shared, rows, options.steps, folder),
        }
        seconds: dict[str, list[float]] = {side: [] for side in sides}
        for number in range(options.rounds):
            for place, (side, train) in enumerate(sides.items()):
                clock.seconds, clock._last = [], None
                train(Path(name, f"{number}-{place}"))
                seconds[side].append(statistics.median(clock.seconds))
    lengths = [len(row["input_ids"]) for row in tokens]
    supervised = statistics.mean(sum(label != -100 for label in row["labels"]) for row in tokens)
    print(
        f"{options.tuner}, {ROWS} rows of {statistics.mean(lengths):.0f} tokens, {supervised:.1f} supervised, ", end=""
    )
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {options.rounds} rounds\n")
    print("| side | ms a step | its time / holdfast's (min..max) |")
    print("|---|---|---|")
    for side, found in seconds.items():
        ratios = [a / b for a, b in zip(found, seconds["holdfast run"], strict=True)]
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}..{max(ratios):.2f})"
        print(f"| {side} | {1000 * statistics.median(found):.0f} | {spread} |")


if __name__ == "__main__":
    main()
