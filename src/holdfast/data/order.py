"""Names and orders of a stream's tasks."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from holdfast.errors import ConfigError, did_you_mean


def ordered(
    names: Sequence[str], order: Sequence[str] | str | None, known: Mapping[str, Sequence[str]] | None = None
) -> list[str]:
    """The tasks to learn, in order.

    Args:
        names: of all tasks, in their first order.
        order: names of tasks; "reverse"; "random:SEED"; the name of a known order; or None, for the first order.
        known: orders by name.

    Raises:
        ConfigError: a task or an order is unknown.
    """
    known = known or {}
    if order is None:
        return list(names)
    if order == "reverse":
        return list(reversed(names))
    if isinstance(order, str) and order.startswith("random:"):
        return random.Random(int(order.removeprefix("random:"))).sample(list(names), len(names))
    if isinstance(order, str):
        if order not in known:
            near = did_you_mean(order, [*known, "reverse", "random:0"])
            raise ConfigError(f"stream.order: unknown order {order!r}{near}; a list names the tasks")
        return list(known[order])
    for name in order:
        if name not in names:
            raise ConfigError(f"stream.order: unknown task {name!r}{did_you_mean(name, names)}")
    return list(order)


def check_names(names: Sequence[str]) -> None:
    """ConfigError if two tasks have one name, or a name is good for no file."""
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"stream: two tasks are called {name!r}; each needs a name of its own")
        if not name.strip(". ") or any(character in name for character in "/\\\0"):
            raise ConfigError(f"stream: a task cannot be called {name!r}: its name must be good for a file's name too")
