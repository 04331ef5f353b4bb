"""Errors that a person caused and can mend: one clear message, exit code 2, no traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """The user's configuration, data or directory is wrong.

    The message names the key, file and row where there is one, says what is wrong and what would be right.
    The command line prints it without a traceback and exits with ``exit_code``.
    """

    exit_code = 2


class ConfigError(UserError):
    """A key of the configuration is unknown, missing or has a value that cannot be used."""


class DataError(UserError):
    """A row, file or split cannot be used."""


class ColumnsError(DataError):
    """A mapping of columns does not fit a row."""


class RunDirectoryError(UserError):
    """The output directory cannot be written, is in use, or belongs to another configuration."""


class NonFiniteLossError(UserError):
    """A loss became NaN or infinite; training stopped before the optimizer touched the weights."""


class OutOfMemoryError(UserError):
    """The machine has too little memory for a step, an evaluation or the weights; the message says what to lower."""


class GateFailed(Exception):  # noqa: N818 - it is a verdict on the model, not a fault of the run
    """A stage did not keep to the gate's limits; the message is the table of what failed."""

    exit_code = 3


class ProcessFailed(RuntimeError):  # noqa: N818 - as GateFailed
    """One of the processes of a run died; the message is its own error, or how it ended."""

    exit_code = 1


class MethodError(RuntimeError):
    """A method broke its contract, for example by declaring a loss term that never contributes."""


class Interrupted(Exception):  # noqa: N818 - it is no failure: the run was asked to stop and has saved its state
    """SIGINT or SIGTERM asked the run to stop; the message says what is saved."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the nearest known name, or the known names where none is near."""
    known = sorted(set(known))
    near = [one for one in known if one.casefold() == name.casefold()]
    near = near or difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; known: {', '.join(known)}" if known else ""
