"""No training: the scores of the model as it comes."""

from __future__ import annotations

from holdfast.api.method import Method


class Frozen(Method):
    """Do not train the model; every row of the score matrix is the one before training."""

    name = "frozen"
    schedule = "none"
