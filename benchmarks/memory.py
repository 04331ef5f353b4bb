"""Memory of training as `holdfast doctor` estimates it beside what it takes: `python benchmarks/memory.py --help`.

Every case trains two steps with ContinualTrainer in a process of its own, on a Llama with random weights and random
rows; AdamW's averages are there from the first step's end on. Measured is the most that the process held beyond what
it held after training a tiny model: of its resident memory on a CPU (Linux), of torch's allocations on a GPU. On a CPU
with glibc it is measured twice: in an ordinary process, and with every tensor mapped apart, so that its heap has no
holes.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, TrainingArguments

from holdfast import ContinualTrainer
from holdfast.config.section import Named
from holdfast.data.collate import Collator
from holdfast.training.arguments import GRADIENT_CHECKPOINTING
from holdfast.training.memory_estimate import Estimate
from holdfast.tuners import build

VOCAB, ROWS, LENGTH = 16384, 4, 128
SIZES = {"20M": (384, 7), "60M": (640, 9), "150M": (1024, 10)}
"""Hidden size and layers."""
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def llama(hidden: int, layers: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        tie_word_embeddings=True,
        pad_token_id=0,
    )


def train(config: LlamaConfig, tuner: str, precision: str, checkpointing: bool) -> None:
    """Two steps of ROWS rows, one of them a token shorter, so that attention has a mask."""
    torch.manual_seed(0)
    ids = torch.randint(3, config.vocab_size, (2 * ROWS, LENGTH)).tolist()
    rows = [{"input_ids": row, "labels": row} for row in (row[: LENGTH - i % ROWS // 3] for i, row in enumerate(ids))]
    with torch.device(DEVICE):
        model = build(Named(name=tuner)).prepare(AutoModelForCausalLM.from_config(config, dtype=torch.float32))
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            per_device_train_batch_size=ROWS,
            max_steps=2,
            optim="adamw_torch",
            bf16=precision == "bfloat16",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            use_cpu=DEVICE == "cpu",
            dataloader_pin_memory=DEVICE == "cuda",
            **{GRADIENT_CHECKPOINTING: checkpointing},
        )
        trainer = ContinualTrainer(model=model, args=arguments, train_dataset=rows, data_collator=Collator(0))
        trainer.train()


def held(most: bool) -> int:
    """Bytes that this process holds now, or the most that it held."""
    if DEVICE == "cuda":
        return torch.cuda.max_memory_allocated() if most else torch.cuda.memory_allocated()
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    [kib] = re.findall(rf"{'VmHWM' if most else 'VmRSS'}:\s+(\d+) kB", status)
    return int(kib) * 1024


def measured(size: str, tuner: str, precision: str, checkpointing: bool) -> int:
    """Bytes at the peak of training."""
    torch.set_num_threads(1)
    train(llama(64, 1), tuner, precision, checkpointing)
    before = held(most=False)
    train(llama(*SIZES[size]), tuner, precision, checkpointing)
    return held(most=True) - before


def estimated(size: str, tuner: str, precision: str, checkpointing: bool) -> tuple[int, int]:
    """Bytes at the peak of training, by the library: with the heap's holes, and without."""
    memory = Estimate(llama(*SIZES[size]), build(Named(name=tuner)), LENGTH, precision, DEVICE).memory(ROWS)
    peak = memory.peak(checkpointing)
    return peak, peak - memory.holes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--tuners", nargs="+", default=["full", "lora"])
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations")
    parser.add_argument("--one", action="store_true", help="print the measured bytes of the first case alone")
    options = parser.parse_args()
    how = (options.precision, options.checkpointing)
    if options.one:
        print(measured(options.sizes[0], options.tuners[0], *how))
        return
    print("| size | tuner | estimated, MiB | measured | ratio ", end="")
    print("| estimated without holes | measured | ratio without holes |")
    print("|---|---|---|---|---|---|---|---|")
    for size in options.sizes:
        for tuner in options.tuners:
            command = [sys.executable, __file__, "--one", "--sizes", size, "--tuners", tuner, "--precision", how[0]]
            command += ["--checkpointing"] if options.checkpointing else []
            cells = []
            settings: list[dict[str, str]] = [{}, {"MALLOC_MMAP_THRESHOLD_": "65536"}]
            for guess, setting in zip(estimated(size, tuner, *how), settings, strict=True):
                output = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | setting)
                real = int(output.stdout.split()[-1])
                cells += [f"{guess / 2**20:.0f}", f"{real / 2**20:.0f}", f"{guess / real:.2f}"]
            print(f"| {size} | {tuner} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
