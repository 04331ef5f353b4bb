"""Cost of tree_lora beside sequential LoRA: time a step, interleaved in one process, and the share of its hook alone.

Without a GPU, times are CPU seconds of this process on one thread, so that other work on the machine counts little.

usage: python benchmarks/tree_lora.py [--rounds 7] [--steps 3] [--tasks 8] [--distance l1|cosine] [--rank 16]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from steps import Clock, arguments, busy_time
from transformers import LlamaConfig, LlamaForCausalLM

from holdfast import ContinualTrainer
from holdfast.api.stage import Stage, Step
from holdfast.data.collate import Collator
from holdfast.engines.shards import Shards
from holdfast.engines.vectors import weights
from holdfast.methods.tree_lora import TreeLoRA

VOCAB, HIDDEN, LAYERS, SEQ, BATCH = 8192, 256, 6, 256, 8


class TimedTreeLoRA(TreeLoRA):
    """tree_lora that knows how long its hook took in each step."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.seconds: list[float] = []

    def after_backward(self, step: Step, gradients: Shards) -> dict[str, float]:
        started = busy_time()
        values = super().after_backward(step, gradients)
        self.seconds.append(busy_time() - started)
        return values


def make(method: Any, folder: Path, steps: int, rank: int) -> tuple[Any, Clock]:
    """A trainer of a LoRA on every linear layer but the head."""
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
    lora = LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM")
    model: Any = get_peft_model(LlamaForCausalLM(config), lora)
    tokens = torch.randint(3, VOCAB, (BATCH * (steps + 1), SEQ)).tolist()
    clock = Clock()
    args = arguments(folder, BATCH, steps)
    rows = [{"input_ids": ids, "labels": ids} for ids in tokens]
    trainer = ContinualTrainer(
        model=model, args=args, train_dataset=rows, data_collator=Collator(0), callbacks=[clock], method=method
    )
    return trainer, clock


def remember(method: TimedTreeLoRA, trainer: Any, tasks: int) -> None:
    """Give a method past tasks with random gradients."""
    for index in range(1, tasks + 1):
        stage = Stage(index, f"past {index}", trainer.model, [], trainer.data_collator, 0, BATCH)
        method.before_stage(stage)
        gradients = weights(trainer.model).zeros_like()
        for t in gradients:
            t.normal_()
        method.after_backward(Step(stage, 0, BATCH, 1, False), gradients)
        method.after_stage(stage)
    method.seconds.clear()
    trainer.stage_index = tasks + 1


def main() -> None:
    """Print the ratio of the two and the hook's share."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="how often each has its turn")
    parser.add_argument("--steps", type=int, default=3, help="counted steps in a turn")
    parser.add_argument("--tasks", type=int, default=8, help="past tasks in the tree")
    parser.add_argument("--distance", choices=("l1", "cosine"), default="l1")
    parser.add_argument("--rank", type=int, default=16)
    options = parser.parse_args()
    torch.set_num_threads(1)
    ratios, steps, shares = [], [], []
    with tempfile.TemporaryDirectory() as name:
        for _ in range(options.rounds):
            plain, plain_clock = make("sequential", Path(name), options.steps, options.rank)
            method = TimedTreeLoRA(distance=options.distance)
            tree, tree_clock = make(method, Path(name), options.steps, options.rank)
            remember(method, tree, options.tasks)
            plain.train()
            tree.train()
            base, step = statistics.median(plain_clock.seconds), statistics.median(tree_clock.seconds)
            ratios.append(step / base)
            steps.append(base)
            shares.append(statistics.median(method.seconds) / base)
    trained = sum(p.numel() for p in plain.model.parameters() if p.requires_grad)
    print(
        f"hidden {HIDDEN}, {LAYERS} layers, rank {options.rank}: {trained:,} LoRA weights; {BATCH} x {SEQ} tokens; ",
        end="",
    )
    print(f"{options.tasks} past tasks; torch {torch.__version__}, 1 thread, {options.rounds} rounds")
    print(f"sequential: {1000 * statistics.median(steps):.0f} ms a step\n")
    print("| side | time / sequential (min..max) |\n|---|---|")
    for side, found in (("tree_lora", ratios), ("its hook alone", shares)):
        print(f"| {side} | {statistics.median(found):.3f} ({min(found):.3f}..{max(found):.3f}) |")


if __name__ == "__main__":
    main()
