"""Tuners: which weights are trained; one file each."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from typing import Any

from holdfast.api.tuner import Tuner
from holdfast.config.section import Named
from holdfast.errors import ConfigError, did_you_mean


def known() -> dict[str, type[Tuner]]:
    """Every tuner by name."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    found = {cls.name: cls for cls in _below(Tuner) if "name" in vars(cls)}
    return dict(sorted(found.items()))


def build(tuner: Named) -> Tuner:
    """Make the tuner of a run.

    Raises:
        ConfigError: there is no such tuner, or it has no such option.
    """
    tuners = known()
    if tuner.name not in tuners:
        raise ConfigError(f"tuner: there is no tuner {tuner.name!r}{did_you_mean(tuner.name, tuners)}")
    return tuners[tuner.name](**tuner.options)


def _below(cls: Any) -> Iterator[type[Tuner]]:
    for found in cls.__subclasses__():
        yield found
        yield from _below(found)
