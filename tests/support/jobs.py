"""A job for tests of worker processes; a module of its own, so that a worker imports little."""

import os
import signal

from holdfast.errors import ConfigError


def job(what: str) -> int:
    """Die, raise, or say which process this is."""
    if what == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "raise":
        raise ConfigError("a key is wrong")
    return os.getpid()
