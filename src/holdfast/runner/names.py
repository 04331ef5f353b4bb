"""The names in a configuration, checked before anything that they name is imported."""

from __future__ import annotations

from holdfast import methods
from holdfast.config.run import RunConfig
from holdfast.tuners import TUNERS


def check_names(config: RunConfig) -> None:
    """Refuse an unknown method or tuner, or an unknown key of its options, before any of them is imported.

    Raises:
        ConfigError: with a near name.
    """
    for method in config.method:
        methods.check(method.name, method.options)
    if config.tuner is not None:
        TUNERS.check(config.tuner.name, config.tuner.options)
