"""Methods against forgetting: one short file each; api/method.py is the whole contract.

A method is found by its ``name`` if its file lies in this folder, if an installed package registers it in the entry
point group ``holdfast.methods``, or if the configuration names its file (``method: path/to/mine.py``).
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

from holdfast.api.declared import Page
from holdfast.api.method import Method
from holdfast.api.registry import Registry
from holdfast.errors import ConfigError

METHODS: Registry[Method] = Registry(Method, __name__)


def known() -> dict[str, type[Method]]:
    """Every method by name."""
    return METHODS.known()


def find(name: str) -> type[Method]:
    """The method of this name, or the one that the Python file of this name defines.

    Raises:
        ConfigError: there is no such method; a near name is offered.
    """
    if name.endswith(".py"):
        return _from_file(Path(name))
    return METHODS.find(name)


def page(name: str) -> Page:
    """What is shown of the method of this name, or of a Python file's; ConfigError where there is none."""
    return Page.of(find(name)) if name.endswith(".py") else METHODS.page(name)


def check(name: str, options: Collection[str]) -> None:
    """Refuse an unknown name or option before a method is imported; see :meth:`Registry.check`."""
    if not name.endswith(".py"):
        METHODS.check(name, options)
    elif not Path(name).is_file():
        raise ConfigError(f"method: there is no file {name}")


def build(methods: list[tuple[str, dict[str, Any]]]) -> list[Method]:
    """Make the methods of a run from (name, options), in the order in which they are called.

    Raises:
        ConfigError: a name or option is unknown, a method stands twice, or methods cannot be applied together.
    """
    built = [find(name)(**options) for name, options in methods]
    check_together(built)
    return in_turn(built)


def in_turn(methods: list[Method]) -> list[Method]:
    """Methods that are applied together, in the order in which they are called: by their turns, and those of one turn
    as the list has them, since dropout and rounding follow the order of their terms."""
    return sorted(methods, key=lambda method: method.turn)


def check_together(methods: list[Method]) -> None:
    """ConfigError if a method stands twice, or methods cannot be applied together."""
    names = [method.name for method in methods]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"method: {name!r} stands twice in the list; once is enough")
    for method in methods:
        if method.schedule != "sequence" and len(methods) > 1:
            what = "learns all tasks at once" if method.schedule == "joint" else "trains nothing"
            raise ConfigError(
                f"method: {method.name!r} {what}, so it cannot be applied together with "
                f"{', '.join(repr(n) for n in names if n != method.name)}; run it alone as a reference"
            )
        for other in names:
            if other in method.not_with:
                raise ConfigError(
                    f"method: {method.name!r} and {other!r} cannot be applied together: {method.not_with[other]}"
                )


def _from_file(path: Path) -> type[Method]:
    if not path.is_file():
        raise ConfigError(f"method: there is no file {path}")
    module_name = f"holdfast_method_{path.stem}"
    before = dict(Method.registry)
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    spec.loader.exec_module(module)
    defined = [cls for cls in Method.registry.values() if cls.__module__ == module_name]
    if len(defined) != 1:
        Method.registry.clear()
        Method.registry.update(before)
        raise ConfigError(f"method: {path} defines {len(defined)} methods with a name; it must define one")
    return defined[0]
