"""Listen at a port, or say why it cannot be listened at and what to do."""

from __future__ import annotations

import errno
import socket

from holdfast.errors import ConfigError

RESERVED = 1024
"""Lower ports are the administrator's on most systems."""


def no_port(port: int, error: OSError) -> str | None:
    """What is wrong with a port, and what would be right; None: the error is of something else."""
    if error.errno == errno.EADDRINUSE:
        return f"{port} is taken by another program, perhaps by a holdfast that still runs; give another port"
    if error.errno in (errno.EACCES, errno.EPERM) and port < RESERVED:
        return f"{port} is below {RESERVED}, where only an administrator may listen; give a higher port, such as 8080"
    return None


def listening(host: str, port: int) -> socket.socket:
    """A socket that listens there; ConfigError if none can."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family)
    except (OSError, ValueError, TypeError) as error:
        if isinstance(error, OSError) and (why := no_port(port, error)) is not None:
            raise ConfigError(f"--port: {why}") from None
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"--host, --port: {host}:{port} cannot be used ({reason}); choose another") from None
