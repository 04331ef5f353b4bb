"""Classes by name: one file each in a package of holdfast, and more from the entry points of installed packages."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Collection
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from typing import Any, ClassVar, Generic, TypeVar

from holdfast.api.declared import DeclaredClass, Page, Unreadable, read
from holdfast.errors import ConfigError, did_you_mean

T = TypeVar("T", bound="Registered")


class Registered:
    """A base class that knows its subclasses by their ``name``."""

    kind: ClassVar[str]
    """What they are: ``method`` or ``tuner``."""
    registry: ClassVar[dict[str, type[Any]]]

    def __init_subclass__(cls, registered: bool = True, **kwargs: Any) -> None:
        """Make the class known by its ``name``; with ``registered=False`` users cannot choose it (a companion)."""
        super().__init_subclass__(**kwargs)
        name = cls.__dict__.get("name")
        if name is None or not registered:
            return
        other = cls.registry.get(name)
        if other is not None and (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
            raise TypeError(f"two {cls.kind}s are called {name!r}: {other.__module__} and {cls.__module__}")
        cls.registry[name] = cls


class Registry(Generic[T]):
    """The methods, or the tuners, that a configuration can name.

    A class is found by its ``name`` if a module of ``package`` holds it, if an installed package registers it in the
    entry point group ``holdfast.KINDs`` (best under the same name), or if this process has defined it. Names and
    pages of holdfast's own are read from their sources, so that torch is imported once a class itself is asked for.

    Args:
        base: the class that all of them inherit from.
        package: its modules hold one or more classes each.
    """

    def __init__(self, base: type[T], package: str):
        self.base, self.package = base, package
        self.kind: str = base.kind

    @property
    def classes(self) -> dict[str, type[T]]:
        """Those that are imported, by name."""
        return self.base.registry

    @cached_property
    def own(self) -> dict[str, DeclaredClass]:
        """Those of the package, by name, as their sources declare them."""
        declared: dict[str, DeclaredClass] = {}
        for module in pkgutil.iter_modules(importlib.import_module(self.package).__path__):
            name = f"{self.package}.{module.name}"
            try:
                declared |= {cls.name: cls for cls in read(name).classes() if cls.is_a(self.base) and cls.name}
            except Unreadable:
                importlib.import_module(name)  # what it defines is in `classes` then
        return declared

    def names(self) -> list[str]:
        """All names, as far as they are known without an import."""
        return sorted({*self.own, *self.classes, *entries(self.kind)})

    def known(self) -> dict[str, type[T]]:
        """All classes by name, imported."""
        for cls in self.own.values():
            importlib.import_module(cls.source.module)
        for entry in entries(self.kind).values():
            load(entry)
        return dict(sorted(self.classes.items()))

    def find(self, name: str) -> type[T]:
        """The class of this name.

        Raises:
            ConfigError: there is none; a near name is offered.
        """
        if name in self.own:
            importlib.import_module(self.own[name].source.module)
            return self.classes[name]
        installed = entries(self.kind)
        if name in installed:
            load(installed[name])
        elif name not in self.classes:  # a package may have registered it under another name
            for entry in installed.values():
                load(entry)
        if name not in self.classes:
            raise ConfigError(f"{self.kind}: there is no {self.kind} {name!r}{did_you_mean(name, self.names())}")
        return self.classes[name]

    def page(self, name: str) -> Page:
        """What is shown of the class of this name; ConfigError where there is none."""
        if name in self.own:
            try:
                return self.own[name].page()
            except Unreadable:
                pass
        return Page.of(self.find(name))

    def pages(self) -> list[Page]:
        """What is shown of each, by name."""
        for entry in entries(self.kind).values():
            load(entry)
        return [self.page(name) for name in sorted({*self.own, *self.classes})]

    def check(self, name: str, options: Collection[str]) -> None:
        """Refuse an unknown name or option before anything is imported.

        Raises:
            ConfigError: there is no such class, or its options are known and this is none of them.
        """
        if name not in self.own:
            if name not in entries(self.kind):
                self.find(name)
            return
        page = self.page(name)
        keys = [key for key, _, _ in page.options]
        for option in options:
            if option not in keys and not page.open:
                raise ConfigError(f"{self.kind} {name}: {option}: unknown key{did_you_mean(option, keys)}")


def entries(kind: str) -> dict[str, EntryPoint]:
    """The entry points of a kind, by name.

    Raises:
        ConfigError: two packages register the same name.
    """
    installed: dict[str, EntryPoint] = {}
    for entry in entry_points(group=f"holdfast.{kind}s"):
        other = installed.setdefault(entry.name, entry)
        if other.value != entry.value:
            raise ConfigError(
                f"{entry.group}: {other.value} and {entry.value} are both registered as {entry.name!r}; uninstall one"
            )
    return installed


def load(entry: EntryPoint) -> Any:
    """What an installed package registers.

    Raises:
        ConfigError: its module cannot be imported.
    """
    try:
        return entry.load()
    except Exception as error:  # whatever another package may raise
        package = entry.dist.name if entry.dist is not None else "a package"
        raise ConfigError(
            f"{entry.group}: {package} registers {entry.name!r}, which cannot be imported: {error}"
        ) from None
