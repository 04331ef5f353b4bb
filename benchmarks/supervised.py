"""The head on supervised tokens alone beside the head on every position: time a step and peak memory, in one process.

usage: python benchmarks/supervised.py --model FOLDER [--rounds 5] [--steps 4] [--methods sequential lwf] [--plain]
       [--dropout 0.05]

Instruction rows: 8 x 110 tokens, of which the last 5 are supervised; LoRA of rank 16 without dropout. The sides have
turns, with one model, after a turn that does not count. Time is the processor's, of one thread. Memory is the most that
is resident in a turn beyond what was resident before it, with the weights (Linux, glibc); with
MALLOC_MMAP_THRESHOLD_=65536 in the environment, without the holes of glibc's heap. --plain adds plain Trainer,
and --dropout the head on every position with a dropout of LoRA.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import re
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from steps import Clock, arguments
from transformers import AutoModelForCausalLM, Trainer

from holdfast import ContinualTrainer
from holdfast.data.collate import Collator
from holdfast.training import trainer as training

ROWS, LENGTH, SUPERVISED = 8, 110, 5
METHODS: dict[str, Any] = {
    "sequential": "sequential",
    "replay": {"name": "replay", "ratio": 0.5},
    "lwf": "lwf",
    "der": {"name": "der", "ratio": 0.5},
}


def resident(key: str) -> int:
    """A line of /proc/self/status in bytes: VmRSS, now, or VmHWM, at most."""
    [kib] = re.findall(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"))
    return 1024 * int(kib)


def set_dropout(model: Any, p: float) -> None:
    for layer in model.modules():
        if "default" in getattr(layer, "lora_dropout", ()):
            layer.lora_dropout["default"] = torch.nn.Dropout(p) if p else torch.nn.Identity()


def turn(model: Any, side: str, method: Any, rows: list[Any], steps: int, folder: str) -> tuple[float, int]:
    """Train a few steps: median seconds of one, and peak memory beyond that before, bytes."""
    clock = Clock()
    args = arguments(folder, ROWS, steps, use_cpu=True)
    shared = {"model": model, "args": args, "train_dataset": rows, "data_collator": Collator(0), "callbacks": [clock]}
    trainer: Any = Trainer(**shared) if side == "plain" else ContinualTrainer(**shared, method=method)
    if side != "plain" and method != "sequential":  # it has a past
        trainer.train()
        clock.seconds, clock._last = [], None
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    before = resident("VmRSS")
    trainer.train()
    return statistics.median(clock.seconds), resident("VmHWM") - before


def main() -> None:
    """Print one line a method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a causal language model")
    parser.add_argument("--rounds", type=int, default=5, help="how often each side has its turn")
    parser.add_argument("--steps", type=int, default=4, help="counted steps in a turn")
    parser.add_argument("--plain", action="store_true", help="plain Trainer, too")
    parser.add_argument("--dropout", type=float, help="LoRA's, on a further side")
    parser.add_argument("--methods", nargs="*", default=["sequential"], choices=list(METHODS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    whole: Any = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    model = get_peft_model(whole, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    ids = torch.randint(3, whole.config.vocab_size, (ROWS * (options.steps + 1), LENGTH)).tolist()
    rows = [{"input_ids": row, "labels": [-100] * (LENGTH - SUPERVISED) + row[-SUPERVISED:]} for row in ids]
    ours = training.may_gather
    print("| method | side | ms a step | time / every position (min..max) | peak memory, MiB | / every position |")
    print("|---|---|---|---|---|---|")
    for name in options.methods:
        sides = ["every position", "supervised alone", *(["plain"] if options.plain else [])]
        sides += ["every position, dropout"] if options.dropout else []
        seconds: dict[str, list[float]] = {side: [] for side in sides}
        memory: dict[str, list[int]] = {side: [] for side in sides}
        with tempfile.TemporaryDirectory() as folder:
            turn(model, "every position", METHODS[name], rows, 1, folder)
            for _ in range(options.rounds):
                for side in sides:
                    setattr(training, "may_gather", ours if side == "supervised alone" else lambda *args: False)  # noqa: B010
                    set_dropout(model, options.dropout if side.endswith("dropout") else 0.0)
                    found = turn(model, side, METHODS[name], rows, options.steps, folder)
                    seconds[side].append(found[0])
                    memory[side].append(found[1])
        first = statistics.median(memory["every position"])
        for side in sides:
            ratios = [a / b for a, b in zip(seconds[side], seconds["every position"], strict=True)]
            step, held = statistics.median(seconds[side]), statistics.median(memory[side])
            spread = f"{statistics.median(ratios):.3f} ({min(ratios):.3f}..{max(ratios):.3f})"
            print(
                f"| {name} | {side} | {1000 * step:.0f} | {spread} | {held / 2**20:.0f} | {held / first:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
