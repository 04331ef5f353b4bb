"""All tasks at once: the upper bound."""

from __future__ import annotations

from holdfast.api.method import Method


class Joint(Method):
    """Train once on the shuffled union of all tasks. It learns no stream, so it is a reference, not a competitor."""

    name = "joint"
    schedule = "joint"
