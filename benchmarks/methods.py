"""Cost of each method beside plain Trainer: time a step, interleaved in one run, and peak memory, one process each.

usage: python benchmarks/methods.py [--rounds 5] [--steps 4] [--methods replay gere ...] [--lora] [--busy]

Bounds are those of arithmetic alone, with rho rehearsal rows per task row of the same length: next-token rehearsal
1 + rho; a cached teacher costs nothing while training but the head once more for KL; LwF's teacher is one more forward
pass, 4/3 in full fine-tuning and 3/2 with LoRA.
"""

from __future__ import annotations

import argparse
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from steps import Clock, arguments, busy_time, tokenizer, wall_time
from transformers import LlamaConfig, LlamaForCausalLM, Trainer

from holdfast import ContinualTrainer
from holdfast.api.method import Method
from holdfast.api.stage import Stage
from holdfast.data.collate import Collator

VOCAB, HIDDEN, LAYERS, SEQ, BATCH, RHO = 8192, 256, 6, 256, 8, 0.5


def head_share() -> float:
    """Share of the model's forward arithmetic that is its head."""
    blocks = LAYERS * (4 * HIDDEN**2 + 3 * HIDDEN * 3 * HIDDEN + 2 * HIDDEN * SEQ)
    return VOCAB * HIDDEN / (VOCAB * HIDDEN + blocks)


def specs(corpus: str, lora: bool) -> dict[str, tuple[Any, float]]:
    """Method by name, and the bound of its step's time relative to plain Trainer."""
    teacher_head = RHO * head_share() / (2 if lora else 3)
    own = {"name": "rehearsal", "source": "self", "path": corpus, "ratio": RHO}
    return {
        "sequential": ("sequential", 1.0),
        "replay": ({"name": "replay", "ratio": RHO}, 1 + RHO),
        "self ce": (own, 1 + RHO),
        "self kl": (own | {"loss": "kl"}, 1 + RHO + teacher_head),
        "self margin": (own | {"loss": "margin"}, 1 + RHO),
        "self l2": (own | {"loss": "l2"}, 1 + RHO),
        "gere": (own | {"loss": "margin", "weight": 100.0, "ce_weight": 1.0}, 1 + RHO),
        "gere_kl": (own | {"loss": "kl", "temperature": 2.0, "ce_weight": 1.0}, 1 + RHO + teacher_head),
        "lwf": ("lwf", 1.5 if lora else 4 / 3),
        "ewc": ({"name": "ewc", "samples": 8}, 1.0),
        "a_gem": ({"name": "a_gem", "batch_size": int(RHO * BATCH)}, 1 + RHO),
    }


def make(name: str, method: Any, folder: Path, steps: int, lora: bool, now: Callable[[], float]) -> tuple[Any, Clock]:
    """A trainer that has a past: its methods saw a stage before."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=3 * HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=SEQ,
    )
    model: Any = LlamaForCausalLM(config)
    if lora:
        model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    tokens = torch.randint(3, VOCAB, (BATCH * (steps + 1), SEQ)).tolist()
    rows = [{"input_ids": ids, "labels": ids} for ids in tokens]
    clock = Clock(now)
    args = arguments(folder / name.replace(" ", "-"), BATCH, steps)
    shared = {"model": model, "args": args, "train_dataset": rows, "data_collator": Collator(0), "callbacks": [clock]}
    if name == "plain":
        return Trainer(**shared), clock
    trainer = ContinualTrainer(**shared, processing_class=tokenizer(), method=method)
    remember(trainer.methods[0], trainer, rows)
    return trainer, clock


def remember(method: Method, trainer: Any, rows: list[Any]) -> None:
    """End a first stage for a method, without training."""

    def collate(part: Any) -> Any:
        return trainer._prepare_input(trainer.data_collator(part))

    stage = Stage(1, "past", trainer.model, rows[: 4 * BATCH], collate, 0, BATCH, Path(trainer.args.output_dir))
    method.after_stage(stage)
    trainer.stage_index = 2


def main() -> None:
    """Print one line a method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="how often every method has its turn")
    parser.add_argument("--steps", type=int, default=4, help="counted steps in a turn")
    parser.add_argument("--methods", nargs="*", help="only these, and plain Trainer")
    parser.add_argument("--lora", action="store_true", help="train a LoRA of rank 16 instead of every weight")
    parser.add_argument("--busy", action="store_true", help="CPU seconds of one thread, for a machine with other work")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    now = busy_time if options.busy else wall_time
    if options.busy:
        torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpus = folder / "corpus.jsonl"
        ids = torch.randint(3, VOCAB, (4 * BATCH, SEQ)).tolist()
        corpus.write_text("".join(f'{{"input_ids": {row}}}\n' for row in ids), encoding="utf-8")
        chosen = {"plain": (None, 1.0)} | specs(str(corpus), options.lora)
        if options.methods:
            chosen = {k: v for k, v in chosen.items() if k == "plain" or k in options.methods}
        if options.one:
            make(options.one, chosen[options.one][0], folder, 2, options.lora, now)[0].train()
            print(peak_kib())
            return
        seconds: dict[str, list[float]] = {name: [] for name in chosen}
        ratios: dict[str, list[float]] = {name: [] for name in chosen}
        for _ in range(options.rounds):
            turn = {}
            for method, (spec, _) in chosen.items():
                trainer, clock = make(method, spec, folder, options.steps, options.lora, now)
                trainer.train()
                turn[method] = statistics.median(clock.seconds)
            for method, value in turn.items():
                seconds[method].append(value)
                ratios[method].append(value / turn["plain"])
    tuner = "LoRA" if options.lora else "full"
    print(f"{tuner}, hidden {HIDDEN}, {LAYERS} layers, vocabulary {VOCAB}, {BATCH} x {SEQ} tokens, rho {RHO}, ", end="")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {options.rounds} rounds\n")
    print("| method | ms a step | task tokens/s | time / plain (min..max) | bound | time / bound | memory / plain |")
    print("|---|---|---|---|---|---|---|")
    base = peak("plain", options)
    for method, (_, bound) in chosen.items():
        ratio, step = statistics.median(ratios[method]), statistics.median(seconds[method])
        spread = f"{ratio:.3f} ({min(ratios[method]):.3f}..{max(ratios[method]):.3f})"
        memory = base if method == "plain" else peak(method, options)
        print(
            f"| {method} | {1000 * step:.0f} | {BATCH * SEQ / step:,.0f} | {spread} "
            f"| {bound:.3f} | {ratio / bound:.3f} | {memory / base:.2f} |"
        )


def peak_kib() -> int:
    """Peak memory of this process (Linux). ru_maxrss would count the parent's, which a child inherits."""
    [kib] = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"))
    return int(kib)


def peak(method: str, options: argparse.Namespace) -> int:
    """Peak memory of a process that trains two steps with this method, KiB."""
    command = [sys.executable, __file__, "--one", method, *(["--lora"] if options.lora else [])]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


if __name__ == "__main__":
    main()
