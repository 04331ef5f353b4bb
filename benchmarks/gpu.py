"""What a GPU gives: checks first, then tokens/s, model FLOPs utilisation and memory of methods beside Trainer and TRL.

usage: python benchmarks/gpu.py [--shapes 135M 1B] [--minutes 8] [--rounds 2] [--steps 6] [--model FOLDER]

The weights are random, of the shapes of SmolLM2-135M and of Llama 3.2 1B; every token is supervised; bfloat16 by
autocast, as `training.precision: bfloat16`. The sides have turns. Utilisation is beside the fastest product of two
large bfloat16 matrices on this device, so 1 is the machine's own limit. What there is no time for is named as left out.
--model FOLDER: a real model, whose responses by our batches and by vLLM are timed and compared.
The shape `tiny` tries the script where there is no GPU.
"""

from __future__ import annotations

import argparse
import copy
import gc
import importlib.util
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from steps import Clock, arguments, tokenizer, wall_time
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Trainer

from holdfast import ContinualTrainer
from holdfast.api.stage import Stage
from holdfast.data.collate import Collator
from holdfast.errors import ConfigError
from holdfast.system.device import device_type, free_unused_memory, gpu_name, gpu_peak, on_gpu, reset_gpu_peak

RHO = 0.5
"""Rehearsal rows per task row."""


@dataclass(frozen=True)
class Shape:
    """The size of a model and of its batches.

    Attributes:
        batch: rows of `length` tokens.
    """

    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    batch: int
    length: int

    def model(self, attention: str | None = None) -> Any:
        """A model with random weights, float32, equal for equal shapes."""
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=self.vocab,
            hidden_size=self.hidden,
            intermediate_size=self.inner,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            max_position_embeddings=self.length,
            tie_word_embeddings=True,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
            attn_implementation=attention,
        )
        with torch.device(device_type()):
            return LlamaForCausalLM(config)

    @property
    def step_tokens(self) -> int:
        return self.batch * self.length

    def flops(self, lora: bool) -> float:
        """Of a token of a step: forward, backward to the activations and, of full fine-tuning, to the weights."""
        width = self.hidden * self.kv_heads // self.heads
        block = 2 * self.hidden**2 + 2 * self.hidden * width + 3 * self.hidden * self.inner
        attention = 2 * self.hidden * self.length / 2  # scores and values, causal
        forward = 2 * (self.layers * (block + attention) + self.hidden * self.vocab)
        return forward * (2 if lora else 3)


SHAPES = {
    "tiny": Shape(64, 128, 2, 4, 2, 512, 2, 32),
    "135M": Shape(576, 1536, 30, 9, 3, 49152, 16, 512),
    "1B": Shape(2048, 8192, 16, 32, 8, 128256, 4, 1024),
}


def methods(corpus: str) -> dict[str, tuple[Any, float]]:
    """Each method, and the arithmetic of its step beside that of plain training."""
    own = {"name": "rehearsal", "source": "self", "path": corpus, "ratio": RHO}
    return {
        "sequential": ("sequential", 1.0),
        "replay": ({"name": "replay", "ratio": RHO}, 1 + RHO),
        "kl": (own | {"loss": "kl"}, 1 + RHO),
        "gere": (own | {"loss": "margin"}, 1 + RHO),
    }


OPTIONS: dict[str, dict[str, Any]] = {
    "sequential, flash attention": {"attention": "flash_attention_2", "needs": "flash_attn"},
    "sequential, liger": {"arguments": {"use_liger_kernel": True}, "needs": "liger_kernel"},
    "sequential, compiled": {"arguments": {"torch_compile": True}},
    "sequential, float32": {"arguments": {"bf16": False}},
}


def rows_of(shape: Shape, count: int) -> list[dict[str, list[int]]]:
    torch.manual_seed(1)
    ids = torch.randint(3, shape.vocab, (count, shape.length)).tolist()
    return [{"input_ids": row, "labels": row} for row in ids]


def adapted(model: Any) -> Any:
    torch.manual_seed(2)
    return get_peft_model(model, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))


def make(side: str, shape: Shape, lora: bool, folder: Path, steps: int, corpus: str) -> tuple[Any, Clock]:
    """A trainer of one side; methods have seen a stage before.

    Raises:
        ModuleNotFoundError: the side needs a package that is not installed.
    """
    option = OPTIONS.get(side, {})
    if "needs" in option and importlib.util.find_spec(option["needs"]) is None:
        raise ModuleNotFoundError(option["needs"])
    model = shape.model(option.get("attention"))
    model = adapted(model) if lora else model
    rows, clock = rows_of(shape, shape.batch * (steps + 1)), Clock(wall_time)
    more = {"bf16": on_gpu(), "use_cpu": not on_gpu()} | option.get("arguments", {})
    shared: dict[str, Any] = {"model": model, "data_collator": Collator(0), "callbacks": [clock]}
    if side == "TRL":
        return trl_trainer(shared, rows, folder, shape.batch, steps, more), clock
    shared |= {"args": arguments(folder, shape.batch, steps, **more), "train_dataset": rows}
    if side == "Trainer":
        return Trainer(**shared), clock
    trainer: Any = ContinualTrainer(
        **shared, processing_class=tokenizer(), method=methods(corpus)[side.partition(",")[0]][0]
    )

    def collate(part: Any) -> Any:
        return trainer._prepare_input(trainer.data_collator(part))

    past = Stage(1, "past", trainer.model, rows[: 2 * shape.batch], collate, 0, shape.batch, folder)
    for method in trainer.methods:
        method.after_stage(past)
    trainer.stage_index = 2
    return trainer, clock


def trl_trainer(shared: dict[str, Any], rows: list[Any], folder: Path, batch: int, steps: int, more: Any) -> Any:
    """SFTTrainer on the same rows, tokenised."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    given = arguments(folder, batch, steps, **more).to_dict()
    kept = {key: given[key] for key in ("per_device_train_batch_size", "max_steps", "save_strategy", "logging_steps")}
    kept |= {"report_to": "none", "disable_tqdm": True, "output_dir": str(folder), "max_length": None} | more
    args = SFTConfig(**kept, dataset_kwargs={"skip_prepare_dataset": True})
    return SFTTrainer(**shared, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer())


def checks(folder: Path) -> Iterator[tuple[str, float, float]]:
    """What is right before it is fast: a difference by name, and how large it may be."""
    shape = SHAPES["tiny"]
    batch = {k: torch.tensor([r[k] for r in rows_of(shape, 4)]) for k in ("input_ids", "labels")}
    here, there = shape.model().cpu(), shape.model()
    losses = []
    for model in (here, there):
        loss = model(**{k: v.to(model.device) for k, v in batch.items()}).loss
        loss.backward()
        losses.append(loss.item())
    yield "float32 loss, this device and the processor", abs(losses[0] - losses[1]), 1e-4
    apart = [(a.grad - b.grad.cpu()).abs().max() for a, b in zip(here.parameters(), there.parameters(), strict=True)]
    yield "float32 gradients, the same", float(max(apart)), 1e-4
    with torch.autocast(device_type(), torch.bfloat16):
        loss = float(there(**{k: v.to(there.device) for k, v in batch.items()}).loss)
    yield "bfloat16 loss and float32", abs(loss - losses[1]), 0.05
    trained = {}
    for side in ("Trainer", "sequential"):
        trainer, _ = make(side, shape, False, folder, 3, "")
        trainer.train()
        trained[side] = copy.deepcopy(trainer.model.state_dict())
    worst = max(float((v - trained["sequential"][k]).abs().max()) for k, v in trained["Trainer"].items())
    yield "weights of sequential and of Trainer after four steps", worst, 1e-5
    if importlib.util.find_spec("flash_attn"):
        on_device = {k: v.to(there.device) for k, v in batch.items()}
        attended = [shape.model(a).bfloat16()(**on_device).loss.item() for a in ("sdpa", "flash_attention_2")]
        yield "bfloat16 loss by flash attention and by sdpa", abs(attended[0] - attended[1]), 0.02


def fastest_product(seconds: float = 1.0) -> float:
    """FLOP/s of the fastest product of two large bfloat16 matrices."""
    size = 8192 if on_gpu() else 1024
    a = torch.randn(size, size, device=device_type(), dtype=torch.bfloat16)
    best, end = 0.0, time.monotonic() + seconds
    while time.monotonic() < end or not best:
        start = wall_time()
        for _ in range(5):
            a @ a
        best = max(best, 5 * 2 * size**3 / (wall_time() - start))
    return best


def turn(side: str, shape: Shape, lora: bool, steps: int, corpus: str) -> tuple[float, float]:
    """Median seconds of a step, and GiB at most."""
    gc.collect()
    if on_gpu():
        reset_gpu_peak()
    with tempfile.TemporaryDirectory() as folder:
        trainer, clock = make(side, shape, lora, Path(folder), steps, corpus)
        trainer.train()
    return statistics.median(clock.seconds), gpu_peak() / 2**30 if on_gpu() else float("nan")


def table(name: str, lora: bool, turns: argparse.Namespace, corpus: str, top: float, late: Callable[[], bool]) -> None:
    """Print a line a side."""
    shape = SHAPES[name]
    arithmetic = {"Trainer": 1.0, "TRL": 1.0} | {k: bound for k, (_, bound) in methods(corpus).items()}
    arithmetic |= dict.fromkeys(OPTIONS, 1.0)
    seconds: dict[str, list[float]] = {}
    memory: dict[str, float] = {}
    missing: dict[str, str] = {}
    for _ in range(turns.rounds):
        for side in arithmetic:
            if late():
                missing.setdefault(side, "no time left")
            elif side not in missing:
                try:
                    step, memory[side] = turn(side, shape, lora, turns.steps, corpus)
                    seconds.setdefault(side, []).append(step)
                except ModuleNotFoundError as error:
                    missing[side] = f"{error} is not installed"
                except Exception as error:  # a kernel that this device lacks must not end the table
                    missing[side] = f"{type(error).__name__}: {str(error).splitlines()[0][:80]}"
    print(f"\n## {name}, {'LoRA of rank 16' if lora else 'every weight'}, {shape.batch} × {shape.length} tokens\n")
    print("| side | task tokens/s | time / Trainer | arithmetic | utilisation | peak GiB |\n|---|---|---|---|---|---|")
    for side, bound in arithmetic.items():
        if side in seconds:
            step = statistics.median(seconds[side])
            plain = statistics.median(seconds["Trainer"])
            speed = shape.step_tokens / step
            share = bound * shape.flops(lora) * speed / top
            print(f"| {side} | {speed:,.0f} | {step / plain:.2f} | {bound:.2f} | {share:.2f} | {memory[side]:.1f} |")
        else:
            print(f"| {side} | {missing[side]} | | | | |")
    sys.stdout.flush()


def responses(folder: str, count: int = 64, length: int = 64) -> None:
    """Time greedy responses of a real model by our batches and, where it is installed, by vLLM."""
    from holdfast.models.generation import generate
    from holdfast.models.vllm_engine import vllm_engine

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(device_type())
    torch.manual_seed(3)
    prompts = torch.randint(3, model.config.vocab_size, (count, 32)).tolist()
    print(f"\n## {count} greedy responses of {length} tokens\n\n| side | tokens/s | equal to ours |\n|---|---|---|")
    start = wall_time()
    ours = generate(model, prompts, max_new_tokens=length, batch_size=count, eos_token_ids=[], pad_token_id=0)
    print(f"| generate | {count * length / (wall_time() - start):,.0f} | 1.00 |", flush=True)
    del model
    free_unused_memory()
    try:
        draw = vllm_engine(folder, 32 + length)
    except ConfigError as error:
        print(f"| vLLM | {error} | |")
        return
    start = wall_time()
    theirs = draw(prompts, max_new_tokens=length, seed=0, numbers=range(count), temperature=0.0).tokens
    speed = count * length / (wall_time() - start)
    print(f"| vLLM | {speed:,.0f} | {statistics.mean(a == b for a, b in zip(ours, theirs, strict=True)):.2f} |")


LOOK = """
What to look at:
- A check that fails: do not read the tables.
- `sequential` beyond 1.02 of Trainer: holdfast itself costs time.
- A method beyond its arithmetic times 1.05: two passes where launching kernels dominates (small models), or a loss in
  float32 over the vocabulary.
- Utilisation below 0.3 at 1B: attention or the optimizer's step; compare the lines of flash attention, liger and
  compiled, and give `training.arguments` what helps.
- Memory of `kl` and `gere` beyond `replay`'s: a cache on the device, or logits that are not in chunks.
"""


def main() -> int:
    """Print the checks, the tables and what to look at; 1 if a check fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="*", default=["135M", "1B"], choices=list(SHAPES))
    parser.add_argument("--minutes", type=float, default=8, help="what is not begun by then is left out")
    parser.add_argument("--rounds", type=int, default=2, help="how often each side has its turn")
    parser.add_argument("--steps", type=int, default=6, help="counted steps in a turn")
    parser.add_argument("--model", help="folder of a real model, whose responses are timed")
    options = parser.parse_args()
    end = time.monotonic() + 60 * options.minutes
    print(
        f"{gpu_name() if on_gpu() else 'no GPU: the processor'}, torch {torch.__version__}\n\n| check | off | at most |"
    )
    print("|---|---|---|")
    failed = False
    with tempfile.TemporaryDirectory() as name:
        for check, off, most in checks(Path(name)):
            failed = failed or not off <= most
            print(f"| {check} | {off:.1e} | {most:.0e} |{'' if off <= most else ' FAILED'}", flush=True)
        top = fastest_product()
        print(f"\nfastest product of matrices: {top / 1e12:.2f} TFLOP/s in bfloat16")
        for shape in options.shapes:
            corpus = Path(name, f"{shape}.jsonl")
            rows = rows_of(SHAPES[shape], 2 * SHAPES[shape].batch)
            corpus.write_text("".join(json.dumps({"input_ids": row["input_ids"]}) + "\n" for row in rows))
            for lora in (True, False):
                table(shape, lora, options, str(corpus), top, lambda: time.monotonic() > end)
    if options.model:
        responses(options.model)
    print(LOOK)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
