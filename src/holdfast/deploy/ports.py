"""Why a port cannot be listened at, and what to do."""

from __future__ import annotations

import errno

RESERVED = 1024
"""Lower ports are the administrator's on most systems."""


def no_port(port: int, error: OSError) -> str | None:
    """What is wrong with a port, and what would be right; None: the error is of something else."""
    if error.errno == errno.EADDRINUSE:
        return f"{port} is taken by another program, perhaps by a holdfast that still runs; give another port"
    if error.errno in (errno.EACCES, errno.EPERM) and port < RESERVED:
        return f"{port} is below {RESERVED}, where only an administrator may listen; give a higher port, such as 8080"
    return None
