"""DeepSpeed ZeRO: how it divides weights, gradients and optimizer state among processes, and when it steps."""

from holdfast.engines.zero.engine import Engine, attach, autocast, begin, keep_float32, load_whole, release
from holdfast.engines.zero.gradients import BUCKET, gradient_of_sum
from holdfast.engines.zero.optimizer import Unflattened, unflattened
from holdfast.engines.zero.parts import (
    Part,
    gathered,
    gathered_with_grad,
    gradient,
    is_partitioned,
    is_zero_managed,
    joined,
    part,
    sync_weights,
    weight,
    whole,
)

__all__ = [
    "BUCKET",
    "Engine",
    "Part",
    "Unflattened",
    "attach",
    "autocast",
    "begin",
    "gathered",
    "gathered_with_grad",
    "gradient",
    "gradient_of_sum",
    "is_partitioned",
    "is_zero_managed",
    "joined",
    "keep_float32",
    "load_whole",
    "part",
    "release",
    "sync_weights",
    "unflattened",
    "weight",
    "whole",
]
