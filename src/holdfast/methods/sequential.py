"""Plain fine-tuning on one task after another, the baseline of every method."""

from __future__ import annotations

from holdfast.api.method import Method


class Sequential(Method):
    """Fine-tune on each task in turn, with nothing against forgetting."""

    name = "sequential"
