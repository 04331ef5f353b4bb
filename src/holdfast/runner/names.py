"""Check the names in a configuration before importing what they name."""

from __future__ import annotations

from holdfast import methods
from holdfast.config.run import RunConfig
from holdfast.tuners import TUNERS


def check_names(config: RunConfig) -> None:
    """Check that the methods and the tuner exist and know the keys of their options.

    Raises:
        ConfigError: a name or a key is unknown; the message gives a near name.
    """
    for method in config.method:
        methods.check(method.name, method.options)
    if config.tuner is not None:
        TUNERS.check(config.tuner.name, config.tuner.options)
