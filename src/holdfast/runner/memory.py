"""Too little memory: what a run that ran out of it is told to lower, in numbers where the estimate knows them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from holdfast.api.tuner import Tuner
from holdfast.config.model import ModelConfig
from holdfast.config.run import RunConfig
from holdfast.errors import ConfigError, OutOfMemoryError
from holdfast.models.precision import counted
from holdfast.models.pretrained import load_model_config
from holdfast.models.weights import shapes
from holdfast.system.device import device_type, gpu_memory
from holdfast.training.pitfalls import is_out_of_memory

USABLE = 0.8
"""Share of the memory that training may fill."""

REPLAYED = 0.25
"""Rows of a method beside each of the task's, where its options do not say."""

ELSEWHERE = "A run keeps its settings, so give another output, too"


@contextmanager
def what_to_lower(where: Callable[[], str], told: Callable[[], str]) -> Iterator[None]:
    """Inside, an error of too little memory says what to lower.

    Args:
        where: what was done.
        told: what is to be lowered.

    Raises:
        OutOfMemoryError: there was too little.
    """
    try:
        yield
        return
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        said = str(error).strip().partition("\n")[0]
    raise OutOfMemoryError(f"{where()}: out of memory ({said:.200}). {told()}")


def lower_for_training(config: RunConfig, tuner: Tuner, longest: int, micro: int) -> str:
    """What to lower where a step did not fit.

    Args:
        tuner: that has prepared no model.
        longest: tokens of a row.
        micro: rows of the micro-batch that did not fit.
    """
    from holdfast.training.memory_estimate import Estimate, advice

    training, quantized = config.training, config.model.quantization is not None
    rehearsed = [method.options.get("ratio", REPLAYED) for method in config.method if method.name != "sequential"]
    device = device_type()
    try:
        estimate = Estimate(
            *(load_model_config(config.model), tuner, math.ceil(longest * (1 + sum(rehearsed)))),
            *(counted(training.precision), device, counted(config.model.dtype)),
        )
        changes = advice(estimate, micro, int(USABLE * _memory(device)), training.gradient_checkpointing, quantized)
    except ConfigError:  # shapes alone do not tell it
        changes = None
    if changes:
        fits = f"{changes} would fit by the estimate, into {USABLE:.0%} of {_memory(device) / 2**30:.3g} GiB"
    else:
        lower = [f"training.micro_batch_size: {micro // 2}"] if micro > 1 else []
        lower += [] if training.gradient_checkpointing else ["training.gradient_checkpointing: true"]
        lower += [f"a data.max_length below the {longest} tokens of the longest row", "a smaller model"]
        fits = f"What would need less: {', '.join(lower)}"
    return (
        f"{fits}. A run keeps its settings: give another output, too. `holdfast doctor {config.model.name}` tells more"
    )


def lower_for_evaluation(config: RunConfig) -> str:
    """What to lower where an evaluation did not fit."""
    size = config.evaluation.batch_size
    lower = f"evaluation.batch_size: {size // 2} (now {size})" if size > 1 else "A shorter data.max_length"
    return f"{lower} would need less. {ELSEWHERE}"


def lower_for_loading(model: ModelConfig) -> str:
    """What to do where the weights themselves did not fit."""
    weights = sum(p.numel() for p in shapes(model).parameters())
    sizes = {"float32": 4.0, "bfloat16": 2.0, "4bit": 0.5}
    now = "4bit" if model.quantization else model.dtype
    less = [
        f"{how} needs about {sizes[kind] * weights / 2**30:.2g} GiB"
        for kind, how in (("bfloat16", "model.dtype: bfloat16"), ("4bit", "model.quantization: 4bit, with tuner lora,"))
        if sizes[kind] < sizes.get(now, 4.0)
    ]
    less.append("a smaller model needs less")
    return f"Its {weights / 1e9:.2g} billion weights are loaded in {now}; {'; '.join(less)}"


def _memory(device: str) -> int:
    """Bytes of memory of this machine's first GPU, or its main memory, in use or not."""
    if device != "cpu":
        return gpu_memory()
    import psutil  # type: ignore[import-untyped]

    return psutil.virtual_memory().total
