"""DeepSpeed ZeRO: how it divides weights, gradients and optimizer state among processes, and when it steps."""

from holdfast.engines.zero.engine import Engine, attach, autocast, release

__all__ = ["Engine", "attach", "autocast", "release"]
