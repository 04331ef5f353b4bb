"""Sampling in batches beside one sequence at a time and transformers' own generation, and its share of a kl_pre step.

usage: python benchmarks/sampling.py [--rounds 3] [--busy]

A Llama of width 128, 4 layers, heads of 32, context 128, vocabulary 4096, in float32. Sampling: 128 sequences of 127
tokens after the begin token, with hidden states. A step: 32 rows of the task and 16 drawn ones, 128 tokens each, those
of 8 steps drawn together. Both sides have their turn in each round; the best round counts. On a busy machine, --busy
counts the CPU seconds of one thread instead of the clock's.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, TrainingArguments

from holdfast.lab.tokenizer import train_tokenizer
from holdfast.methods import rehearsal
from holdfast.models.sampling import sample
from holdfast.rehearsal import buffer, teacher
from holdfast.training.trainer import ContinualTrainer

VOCAB, CONTEXT, BATCH, REPLAYED, BUFFER, STEPS = 4096, 128, 32, 16, 8, 16

Clock = Callable[[], float]


def make_model() -> Any:
    """The model of the benchmark, with random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=128,
        intermediate_size=344,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    model = LlamaForCausalLM(config)
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def seconds(run: Callable[[], object], clock: Clock) -> float:
    """Seconds that a call takes."""
    started = clock()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return clock() - started


def ours(model: Any, rows: int) -> None:
    """Draw with holdfast."""
    sample(model, [[0]] * rows, max_new_tokens=CONTEXT - 1, seed=0, hidden=True)


def theirs(model: Any, rows: int) -> None:
    """Draw with model.generate, in its default cache."""
    prompts = torch.zeros(rows, 1, dtype=torch.int64, device=model.device)
    with torch.inference_mode():
        model.eval().generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            do_sample=True,
            top_k=0,
            max_new_tokens=CONTEXT - 1,
            min_new_tokens=CONTEXT - 1,
        )


@contextmanager
def timed(owner: Any, name: str, spent: dict[str, float], part: str, clock: Clock) -> Iterator[None]:
    """Inside, the time in a function counts for a part."""
    original = getattr(owner, name)

    def counted(*args: Any, **kwargs: Any) -> Any:
        started = clock()
        try:
            return original(*args, **kwargs)
        finally:
            spent[part] = spent.get(part, 0.0) + clock() - started

    setattr(owner, name, counted)
    try:
        yield
    finally:
        setattr(owner, name, original)


def training(method: Any, steps: int) -> None:
    """So many steps on random rows."""
    model, tokenizer = make_model(), train_tokenizer(["text"], 300)
    rows = [{"input_ids": (row := torch.randint(3, VOCAB, (CONTEXT,)).tolist()), "labels": row} for _ in range(BATCH)]
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=BATCH,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
            dataloader_pin_memory=False,
        )
        trainer = ContinualTrainer(model, args, train_dataset=rows, processing_class=tokenizer, method=method)
        trainer.remove_callback(PrinterCallback)
        trainer.train()


def step_shares(live: bool, clock: Clock) -> tuple[float, dict[str, float]]:
    """Seconds of a kl_pre step, and of its parts; ``live``: with a teacher's forward pass instead of kept states."""
    spent: dict[str, float] = {}
    method = {"name": "kl_pre", "count": REPLAYED, "buffer": BUFFER, "length": CONTEXT}
    exact = rehearsal.drawn_states_are_exact
    if live:
        rehearsal.drawn_states_are_exact = lambda *args: False
    training("sequential", 1)
    try:
        with (
            timed(buffer, "sample", spent, "sampling", clock),
            timed(teacher.LiveStates, "__call__", spent, "teacher", clock),
            timed(teacher.HiddenTeacher, "sums", spent, "heads and KL", clock),
        ):
            before = seconds(lambda: training(method, BUFFER), clock)  # what comes once: held-out samples, set-up
            spent_before = dict(spent)
            whole = seconds(lambda: training(method, BUFFER + STEPS), clock)
    finally:
        rehearsal.drawn_states_are_exact = exact
    parts = {part: (value - 2 * spent_before[part]) / STEPS for part, value in spent.items()}
    if live:
        parts["heads and KL"] -= parts["teacher"]
    return (whole - before) / STEPS, parts


def main() -> None:
    """Print two tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--busy", action="store_true", help="CPU seconds of one thread instead of the clock's")
    options = parser.parse_args()
    if options.busy:
        torch.set_num_threads(1)
    clock: Clock = time.process_time if options.busy else time.perf_counter
    model = make_model()
    cases = {
        "holdfast, 128 at a time": (ours, 128),
        "holdfast, 1 at a time": (ours, 1),
        "generate, 128 at a time": (theirs, 128),
        "generate, 1 at a time": (theirs, 1),
    }
    rates: dict[str, float] = {}
    for _ in range(options.rounds):
        for name, (run, rows) in cases.items():
            rate = rows * (CONTEXT - 1) / seconds(lambda run=run, rows=rows: run(model, rows), clock)
            rates[name] = max(rates.get(name, 0.0), rate)
    unit = "CPU seconds" if options.busy else "seconds"
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {options.rounds} rounds, {unit}\n")
    print("| sampling | tokens/s | / holdfast, 1 at a time |\n|---|---|---|")
    for name, rate in rates.items():
        print(f"| {name} | {rate:,.0f} | {rate / rates['holdfast, 1 at a time']:.1f} |")
    print(
        "\n| kl_pre | ms a step | sampling | teacher | heads and KL | student, optimizer |\n|---|---|---|---|---|---|"
    )
    found = {live: [step_shares(live, clock) for _ in range(options.rounds)] for live in (False, True)}
    for live, name in ((False, "states kept from sampling"), (True, "a forward pass of the teacher")):
        step, parts = min(found[live], key=lambda one: one[0])
        shares = [parts.get(part, 0.0) / step for part in ("sampling", "teacher", "heads and KL")]
        cells = " | ".join(f"{share:.0%}" for share in [*shares, 1 - sum(shares)])
        print(f"| {name} | {1000 * step:,.0f} | {cells} |")


if __name__ == "__main__":
    main()
