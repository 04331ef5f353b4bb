"""Tuners: which weights are trained; one file each.

A tuner is found by its ``name`` if its file lies in this folder, or if an installed package registers it in the entry
point group ``holdfast.tuners``.
"""

from __future__ import annotations

from holdfast.api.registry import Registry
from holdfast.api.tuner import Tuner
from holdfast.config.section import Named

TUNERS: Registry[Tuner] = Registry(Tuner, __name__)  # type: ignore[type-abstract]


def known() -> dict[str, type[Tuner]]:
    """Every tuner by name."""
    return TUNERS.known()


def find(name: str) -> type[Tuner]:
    """The tuner of this name.

    Raises:
        ConfigError: there is none; a near name is offered.
    """
    return TUNERS.find(name)


def build(tuner: Named) -> Tuner:
    """Make the tuner of a run.

    Raises:
        ConfigError: there is no such tuner, or it has no such option.
    """
    return find(tuner.name)(**tuner.options)
