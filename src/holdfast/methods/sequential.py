"""Plain fine-tuning on one task after another: what every method is compared with."""

from __future__ import annotations

from holdfast.api.method import Method


class Sequential(Method):
    """Fine-tune on each task in turn and do nothing against forgetting."""

    name = "sequential"
