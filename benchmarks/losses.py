"""Time and peak memory of each loss, forward and backward, chunked beside plain: `python benchmarks/losses.py --help`.

Plain is what one writes without thinking of memory: full logits and autograd. Peak memory counts what is allocated
beyond the inputs, gradients included: by the CUDA allocator's own figure on a GPU, by the profiler's record of every
allocation on a CPU. Times are medians of repeats that alternate between the two.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from holdfast.losses import (
    Divergence,
    Head,
    chunked_kl,
    chunked_next_token_nll,
    classify,
    kl_divergence,
    margin_loss,
    next_token_nll,
)

Case = tuple[str, list[Tensor], Callable[[], Tensor], Callable[[], Tensor]]
"""name, tensors that get a gradient, plain loss, our loss."""


def peak_bytes(step: Callable[[], object], device: str) -> int:
    """Most bytes that ``step`` holds at a time beyond what was held before."""
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        step()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        record.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    changes = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e["name"] == "[memory]")
    held = peak = 0
    for _, change in changes:
        held += change
        peak = max(peak, held)
    return peak


def plain_margin(hidden: Tensor, classes: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """The margin loss as its equation reads."""
    h = hidden.float()
    below, between, above = torch.relu(h - low), torch.relu(h - high) + torch.relu(low - h), torch.relu(high - h)
    margin = below * (classes == 0) + between * (classes == 1) + above * (classes == 2)
    return margin.sum() / (torch.count_nonzero(margin) + 1e-8)


def cases(tokens: int, vocab: int, width: int, chunk: int, dtype: torch.dtype, device: str) -> Iterator[Case]:
    """KL and next-token loss with a frozen and a trained head, and the margin loss."""
    torch.manual_seed(0)
    hidden, teacher = torch.randn(2, 1, tokens, width, device=device).to(dtype).unbind(0)
    head = (torch.randn(vocab, width, device=device) / width**0.5).to(dtype)
    teacher_head = (head + 0.1 * torch.randn_like(head) / width**0.5).to(dtype)
    labels = torch.randint(vocab, (1, tokens), device=device)
    hidden.requires_grad_()
    divergence = Divergence(temperature=2.0)
    for kind, weight in (("frozen", head), ("trained", head.clone().requires_grad_())):
        leaves = [hidden, weight] if weight.requires_grad else [hidden]

        def plain_kl(weight: Tensor = weight) -> Tensor:
            with torch.no_grad():
                target = F.linear(teacher, teacher_head)
            return kl_divergence(F.linear(hidden, weight), target, divergence=divergence)[0]

        def our_kl(weight: Tensor = weight) -> Tensor:
            student_head, old_head = Head(weight), Head(teacher_head)
            return chunked_kl(hidden, student_head, teacher, old_head, None, divergence, chunk_size=chunk)[0]

        def plain_nll(weight: Tensor = weight) -> Tensor:
            return next_token_nll(F.linear(hidden, weight), labels)[0]

        def our_nll(weight: Tensor = weight) -> Tensor:
            return chunked_next_token_nll(hidden, Head(weight), labels, chunk_size=chunk)[0]

        yield f"KL, {kind} head", leaves, plain_kl, our_kl
        yield f"next token, {kind} head", leaves, plain_nll, our_nll

    low, high = torch.full((width,), -1.0, device=device), torch.full((width,), 1.0, device=device)
    classes = classify(teacher, low, high)
    yield (
        "margin",
        [hidden],
        lambda: plain_margin(hidden, classes, low, high),
        lambda: margin_loss(hidden, classes, low, high),
    )


def step_of(loss: Callable[[], Tensor], leaves: list[Tensor]) -> Callable[[], None]:
    """Forward and backward; the gradients are held until the next call."""

    def step() -> None:
        for leaf in leaves:
            leaf.grad = None
        (loss() / 7).backward()

    return step


def seconds(step: Callable[[], None], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--vocab", type=int, default=128_000)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--chunk", type=int, default=64, help="tokens whose logits are held at a time")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"torch {torch.__version__}, {vars(args)}\n")
    print("| loss | plain, MiB | ours, MiB | memory / plain | plain, s | ours, s | time / plain |")
    print("|---|---|---|---|---|---|---|")
    dtype = getattr(torch, args.dtype)
    for name, leaves, plain, ours in cases(args.tokens, args.vocab, args.hidden, args.chunk, dtype, args.device):
        steps = step_of(plain, leaves), step_of(ours, leaves)
        memory = []
        for step in steps:
            for leaf in leaves:
                leaf.grad = None
            memory.append(peak_bytes(step, args.device))
        times = [[seconds(step, args.device) for step in steps] for _ in range(args.repeats)]
        slow, fast = (statistics.median(column) for column in zip(*times, strict=True))
        print(
            f"| {name} | {memory[0] / 2**20:.1f} | {memory[1] / 2**20:.1f} | {memory[1] / memory[0]:.2f} "
            f"| {slow:.3f} | {fast:.3f} | {fast / slow:.2f} |"
        )


if __name__ == "__main__":
    main()
