"""DeepSpeed ZeRO: how it divides weights, gradients and optimizer state among processes, and when it steps."""

from holdfast.engines.zero.engine import Engine, attach, release

__all__ = ["Engine", "attach", "release"]
