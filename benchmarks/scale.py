"""What a method takes beside plain training on many GPUs: memory, communication and time, from formulas alone.

With P trained weights, n GPUs and T tasks, of one optimizer step with one micro-batch:

    memory of a GPU, weights split:  (weights + 12 P) / n + 2 blocks + activations + logits + 4 V P / n
    memory of a GPU, weights whole:   weights + 12 P      + activations + logits + 4 V P
    bytes that a GPU sends, split:   (n-1)/n (2 weights + 4 P) for each pass, and (n-1)/n weights for each forward alone
    bytes that a GPU sends, whole:   2 (n-1)/n 4 P for each pass

Weights are float32 where they are trained and bfloat16 where they are frozen; gradients and AdamW's averages float32.
Activations are those of one row with checkpointing, and logits as :mod:`holdfast.training.memory_estimate` counts
them. V is how many float32 vectors of P a method holds at most while a stage trains; they lie as the weights do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

GIB = 2**30
TASKS = 8
"""Tasks that the tables are for, at their last stage."""

LENGTH = 2048
"""Tokens of a row in the tables; a GPU has one row at a time."""


@dataclass(frozen=True)
class Size:
    """A model of Llama's architecture by its shapes."""

    name: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int = 8
    vocabulary: int = 128256


SIZES = (Size("8 B", 4096, 14336, 32, 32), Size("70 B", 8192, 28672, 80, 64))


@dataclass(frozen=True)
class MethodCost:
    """What a method takes beside plain training.

    Attributes:
        vectors: V, for the number of tasks; of the trained weights' size.
        kept: vectors that are left when a stage ends, in its ``method/`` folder.
        passes: forward and backward passes beside the step's own, as a multiple of it.
        forwards: forward passes alone, likewise.
        numbers: numbers that one small all-reduce carries in a step.
        lora: whether it works on LoRA factors alone.
    """

    name: str
    vectors: Callable[[int], float] = lambda tasks: 0
    kept: Callable[[int], float] = lambda tasks: 0
    passes: Callable[[int], float] = lambda tasks: 0
    forwards: float = 0
    numbers: Callable[[int], int] = lambda tasks: 0
    lora: bool = False


OGD_DIRECTIONS = 100
"""OGD's default ``capacity``."""

METHODS = (
    MethodCost("sequential"),
    MethodCost("replay, gere (ratio 0.25)", passes=lambda T: 0.25),
    MethodCost("der_pp (ratio 0.25 each)", passes=lambda T: 0.5),
    MethodCost("kl_replay (ratio 0.25)", lambda T: 1, lambda T: 0, lambda T: 0.25, forwards=0.25),
    MethodCost("lwf", lambda T: 1, forwards=1),
    MethodCost("sdft", lambda T: 2, forwards=1),
    MethodCost("eaft, talr, flow"),
    MethodCost("wise_ft, lines", lambda T: 1),
    MethodCost("mofo", lambda T: 2),
    MethodCost("ewc, mas", lambda T: 3, lambda T: 2, numbers=lambda T: 1),
    MethodCost("si", lambda T: 5, lambda T: 2, numbers=lambda T: 1),
    MethodCost("cia", lambda T: 4, numbers=lambda T: 3),
    MethodCost("a_gem", lambda T: 1, passes=lambda T: 1, numbers=lambda T: 2),
    MethodCost("gem", lambda T: 2 * T, passes=lambda T: T - 1, numbers=lambda T: T * T),
    MethodCost("ogd", lambda T: OGD_DIRECTIONS, lambda T: OGD_DIRECTIONS, numbers=lambda T: OGD_DIRECTIONS),
    MethodCost("tree_lora", lambda T: T, lambda T: T, numbers=lambda T: 2 * T, lora=True),
    MethodCost("o_lora", lambda T: T - 1, numbers=lambda T: 1, lora=True),
)


@dataclass(frozen=True)
class Training:
    """Plain training of one model with one tuner.

    Attributes:
        trained: P.
        weights: bytes of all weights.
        activations: bytes, with the logits.
        layers: decoder blocks.
    """

    trained: int
    weights: int
    activations: int
    layers: int

    def memory(self, gpus: int, split: bool, vectors: float = 0) -> float:
        """Bytes of one GPU, with a method's vectors."""
        held = self.weights + 12 * self.trained + 4 * vectors * self.trained
        if not split:
            return held + self.activations
        return held / gpus + 2 * self.weights / self.layers + self.activations

    def sent(self, gpus: int, split: bool, passes: float = 1, forwards: float = 0) -> float:
        """Bytes that one GPU sends in an optimizer step."""
        share = (gpus - 1) / gpus
        if not split:
            return passes * 2 * share * 4 * self.trained
        return share * (passes * (2 * self.weights + 4 * self.trained) + forwards * self.weights)


@cache
def training(size: Size, tuner: str) -> Training:
    """Plain training of a model, one row of :data:`LENGTH` tokens a GPU, with checkpointing and autocast to bfloat16.

    Args:
        tuner: full or lora (rank 16, every linear layer).
    """
    from transformers import LlamaConfig

    from holdfast import tuners
    from holdfast.config.section import Named
    from holdfast.training.memory_estimate import Estimate

    config = LlamaConfig(
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        vocab_size=size.vocabulary,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
    )
    memory = Estimate(config, tuners.build(Named(name=tuner)), LENGTH, "bfloat16").memory(1)
    assert memory.checkpointed is not None
    frozen = memory.weights // 4 - memory.trained
    weights = 4 * memory.trained + 2 * frozen
    return Training(memory.trained, weights, memory.checkpointed + memory.logits, size.layers)


def tables() -> str:
    """The tables of docs/scale.md: plain training, what a method adds in memory, and what it sends."""
    cases = [(size, tuner) for size in SIZES for tuner in ("lora", "full")]
    plain = [["model", "tuner", "trained", "weights", "1 GPU", "8, whole", "8, split", "64, split", "sent a step"]]
    for size, tuner in cases:
        own = training(size, tuner)
        sizes = [own.memory(1, False), own.memory(8, False), own.memory(8, True), own.memory(64, True)]
        sent = f"{_gib(own.sent(8, False))} whole, {_gib(own.sent(8, True))} split"
        count = f"{own.trained / 1e6:,.0f} M"
        plain.append([size.name, tuner, count, _gib(own.weights), *map(_gib, sizes), sent])
    head = ["method", "vectors of P", "passes"]
    columns = [(size, tuner, gpus) for size, tuner in cases for gpus in (8, 64)]
    more = [[*head, *(f"{size.name} {tuner}, {gpus}" for size, tuner, gpus in columns)]]
    bytes_sent = [["method", *(f"{size.name} {tuner}" for size, tuner in cases), "numbers"]]
    for method in METHODS:
        passes, vectors = method.passes(TASKS), method.vectors(TASKS)
        row = [method.name, f"{vectors:g}", f"{1 + passes + method.forwards / 3:.3g}"]
        for size, tuner, gpus in columns:
            extra = 4 * vectors * training(size, tuner).trained / gpus
            row.append("–" if method.lora and tuner == "full" else _gib(extra))
        more.append(row)
        row = [method.name]
        for size, tuner in cases:
            total = training(size, tuner).sent(8, True, 1 + passes, method.forwards)
            row.append("–" if method.lora and tuner == "full" else _gib(total))
        bytes_sent.append([*row, str(method.numbers(TASKS))])
    return "\n\n".join(_markdown(table) for table in (plain, more, bytes_sent)) + "\n"


def _gib(size: float) -> str:
    gib = size / GIB
    return "0" if gib == 0 else f"{gib:,.0f}" if gib >= 100 else f"{gib:.1f}" if gib >= 1 else f"{gib:.2g}"


def _markdown(rows: list[list[str]]) -> str:
    head, *body = rows
    lines = [head, ["---", *["--:"] * (len(head) - 1)], *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
