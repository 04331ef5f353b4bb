"""The public names: documented, typed, and imported without waiting for torch."""

from __future__ import annotations

import ast
import importlib
import inspect
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

import holdfast
import holdfast.api

PACKAGE = Path(holdfast.__file__).parent
SELF = ("self", "cls")

NAMES = [(module.__name__, name) for module in (holdfast, holdfast.api) for name in module.__all__ if name[0] != "_"]
MODULES = pytest.mark.parametrize("module", ["holdfast", "holdfast.api"])
PUBLIC = pytest.mark.parametrize(("module", "name"), NAMES, ids=[f"{module}.{name}" for module, name in NAMES])


def value(module: str, name: str) -> Any:
    return getattr(importlib.import_module(module), name)


def function_of(member: Any) -> Any:
    """The function of a method or property that a file of the package defines; None for anything else."""
    function = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
    written = inspect.isfunction(function) and Path(function.__code__.co_filename).is_relative_to(PACKAGE)
    return function if written else None


def functions(public: Any) -> Iterator[tuple[str, Any]]:
    """A function itself; of a class its constructor, public methods and properties, as far as holdfast defines them."""
    if inspect.isclass(public):
        for cls in public.__mro__:
            for key, member in vars(cls).items():
                if function_of(member) and (not key.startswith("_") or key == "__init__"):
                    yield key, function_of(member)
    elif function_of(public):
        yield public.__name__, public


def is_documented(public: Any, key: str) -> bool:
    """Whether a function, or a class's method or the one that it overrides, has a docstring."""
    if not inspect.isclass(public):
        return bool(public.__doc__)
    return any(getattr(vars(cls).get(key), "__doc__", None) for cls in public.__mro__)


def untyped(function: Any) -> list[str]:
    """The parameters without annotation, and ``return`` if there is none for the result."""
    signature = inspect.signature(function)
    missing = [p.name for p in signature.parameters.values() if p.annotation is p.empty and p.name not in SELF]
    bare = signature.return_annotation is signature.empty and function.__name__ != "__init__"
    return missing + ["return"] * bare


def has_text_below(module: str, name: str) -> bool:
    """Whether a string follows the assignment of a constant or of a type."""
    home = importlib.import_module(value(module, "_HOME")[name])
    body = ast.parse(inspect.getsource(home)).body
    for node, below in pairwise(body):
        targets = node.targets if isinstance(node, ast.Assign) else []
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            return isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
    return False


@MODULES
def test_each_name_has_one_home(module):
    names, homes = value(module, "__all__"), value(module, "_HOME")
    assert sorted(homes) == sorted(set(names) - {"__version__"}) and len(set(names)) == len(names)
    assert all(getattr(importlib.import_module(home), name) is value(module, name) for name, home in homes.items())


@MODULES
def test_a_name_that_is_not_there_is_an_attribute_error(module):
    with pytest.raises(AttributeError, match="has no attribute 'Methud'"):
        value(module, "Methud")


@PUBLIC
def test_every_public_name_is_documented(module, name):
    public = value(module, name)
    if not (inspect.isclass(public) or inspect.isfunction(public)):
        assert has_text_below(module, name)
        return
    assert public.__doc__
    assert not [key for key, _ in functions(public) if not is_documented(public, key) and key != "__init__"]


@PUBLIC
def test_every_public_function_is_typed(module, name):
    found = {key: untyped(function) for key, function in functions(value(module, name))}
    assert not {key: names for key, names in found.items() if names}


def test_the_checks_above_see_what_is_missing(monkeypatch):
    class Bare:
        def verb(self, stage):
            return stage

    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", Path(__file__).parent)
    [(key, function)] = functions(Bare)
    assert not is_documented(Bare, key) and untyped(function) == ["stage", "return"]
    monkeypatch.undo()
    assert not list(functions(Bare))
    assert {key for key, _ in functions(holdfast.api.Stage)} >= {"random", "gradient", "hidden_states"}


@MODULES
def test_the_door_opens_without_torch(module):
    script = f"import sys, {module}; print('torch' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout == "False\n"
    )
