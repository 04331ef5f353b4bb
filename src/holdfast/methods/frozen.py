"""No training: the floor."""

from __future__ import annotations

from holdfast.api.method import Method


class Frozen(Method):
    """Leave the model as it is; every row of the score matrix is the one before training."""

    name = "frozen"
    schedule = "none"
