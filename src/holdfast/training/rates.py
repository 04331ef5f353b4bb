"""Learning rates and steps with which a stage learns little, or unlearns what the model knew."""

from __future__ import annotations

import math

from transformers import TrainingArguments

FULL = 2e-5
"""A usual rate of full fine-tuning, as of Alpaca, Zephyr and the chat models of Llama 2. That of LoRA is best about ten
times as high (Schulman and Thinking Machines Lab, 2025, LoRA Without Regret)."""

SMALLEST, LARGEST = 10**8, 10**10
"""Weights of the models that :func:`pretraining_rate` is used for: smaller ones are toys, which take any rate, and of
larger ones the rule is not said to hold."""


def pretraining_rate(weights: int) -> float:
    """The peak learning rate at which a model of so many weights is pretrained.

    0.003239 - 0.0001395 ln(weights): equation D.1 of Kaplan et al. (2020, arXiv 2001.08361), up to 10^10 weights; but
    not below 1e-4, that of larger models (GPT-3 of 13 billion weights).
    """
    return max(0.003239 - 0.0001395 * math.log(min(weights, LARGEST)), 1e-4)


def full_rate_advice(rate: float, weights: int) -> str | None:
    """What is to be said of a learning rate for all weights of a model; None where nothing is."""
    if weights < SMALLEST or rate <= pretraining_rate(weights):
        return None
    return (
        f"{rate:g} is a rate for adapters, and all {weights / 1e9:.2g} billion weights of the model are trained: it is "
        f"above that at which such a model is pretrained (about {pretraining_rate(weights):.1g}), and costs what the "
        f"model knew; {rate / 10:.1g} or less would do, or LoRA"
    )


def adapter_rate_advice(rate: float) -> str | None:
    """What is to be said of a learning rate for low-rank adapters alone; None where nothing is."""
    if rate > FULL:
        return None
    return (
        f"{rate:g} is a rate for all weights of a model, and low-rank adapters alone are trained, which hardly learn "
        f"with it; ten times as much, {10 * rate:.1g}, would do"
    )


WITHOUT_WARMUP = ("constant", "reduce_lr_on_plateau", "greedy")
"""Schedules of transformers that begin at their peak, whatever the warm-up."""

FEW = 10
"""In fewer steps AdamW, which moves a weight by about the learning rate in each, moves no weight by ten times it."""


def warmup_advice(arguments: TrainingArguments, steps: int) -> str | None:
    """What is to be said of a stage whose steps are all warm-up; None where some are not, or the schedule has none."""
    name, warmup = arguments.lr_scheduler_type, arguments.get_warmup_steps(steps)
    if getattr(name, "value", name) in WITHOUT_WARMUP or steps > warmup or not warmup:
        return None
    if steps == 1:
        return "the only optimizer step is warm-up, with a learning rate of 0, so that nothing is learned"
    return f"all {steps} optimizer steps are warm-up, so that the learning rate never reaches its peak"


def batch_advice(rows: int, batch: int, steps: int) -> str | None:
    """What is to be said of a batch that is larger than the data; None where it is not, or there are enough steps."""
    if rows >= batch or steps >= FEW:
        return None
    return f"a step of {batch} rows takes all {rows} that there are, so that the optimizer makes few steps ({steps})"
