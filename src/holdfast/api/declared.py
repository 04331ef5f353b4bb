"""What a class declares, read from its source: importing a method or a tuner takes seconds, since it imports torch.

Read are its name, its docstring, some class variables, and the keys of its ``Options`` with defaults and descriptions,
as far as they are literals or constants of holdfast's modules. Whoever meets :class:`Unreadable` imports the module.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from inspect import getdoc
from itertools import chain
from pathlib import Path
from typing import Any

from holdfast.config.describe import describe

SOURCE = Path(__file__).parents[2]
"""The folder that holds the package."""

FACTS = ("tuners", "tuners_reason", "default_tuner", "not_with")
"""Class variables that a page shows, of classes that have them."""


class Unreadable(Exception):  # noqa: N818 - no fault: the module is imported instead
    """What was asked for is no literal, or stands in another package."""


@dataclass(frozen=True)
class Page:
    """What is shown of a method or a tuner.

    Attributes:
        doc: the class's docstring.
        facts: its class variables, by name.
        options: of each option (key, default, description).
        open: whether other options may be given, too.
    """

    name: str
    doc: str
    facts: dict[str, Any]
    options: Sequence[tuple[str, str, str]]
    open: bool

    @classmethod
    def of(cls, shown: Any) -> Page:
        """The page of a class that is imported."""
        facts = {fact: getattr(shown, fact) for fact in FACTS if hasattr(shown, fact)}
        extra = shown.Options.model_config.get("extra") == "allow"
        return cls(shown.name, getdoc(shown) or "", facts, describe(shown.Options), extra)


@dataclass(frozen=True)
class DeclaredClass:
    """A class as its source declares it."""

    source: Source
    node: ast.ClassDef

    @property
    def name(self) -> str:
        """The name by which a configuration calls it; empty where the class itself gives none, or is not registered."""
        value = _assigned(self.node, "name")
        if value is None or any(keyword.arg == "registered" for keyword in self.node.keywords):
            return ""
        return self.source.literal(value)

    def is_a(self, base: type) -> bool:
        """Whether it inherits from a class of holdfast's."""
        return any((cls.source.module, cls.node.name) == (base.__module__, base.__name__) for cls in self.lineage())

    def lineage(self) -> list[DeclaredClass]:
        """The class and those of holdfast that it inherits from, a base that several of them share after them all.

        A method that inherits from two classes of one base is read so as Python reads it.
        """
        bases = [self.source.cls(base.id) for base in self.node.bases if isinstance(base, ast.Name)]
        every = [self, *chain.from_iterable(cls.lineage() for cls in bases if cls is not None)]
        return list(reversed(dict.fromkeys(reversed(every))))

    def page(self) -> Page:
        """What is shown of it.

        Raises:
            Unreadable: a part of it is no literal.
        """
        doc = next((text for cls in self.lineage() if (text := ast.get_docstring(cls.node))), "")
        facts = {}
        for fact in FACTS:
            holders = (cls for cls in self.lineage() if isinstance(_assigned(cls.node, fact), ast.expr))
            if (holder := next(holders, None)) is not None:
                facts[fact] = holder.source.literal(_assigned(holder.node, fact))
        fields = _options(self.lineage())
        extra = fields.pop("model_config", ("", ""))[0] == "allow"
        return Page(self.name, doc, facts, [(key, *rest) for key, rest in fields.items()], extra)


@dataclass(frozen=True)
class Source:
    """A module of holdfast that is read, not run."""

    module: str
    tree: ast.Module

    def cls(self, name: str) -> DeclaredClass | None:
        """The class of this name, defined here or imported; None where another package defines it."""
        for node in self.tree.body:
            if isinstance(node, ast.ClassDef) and node.name == name:
                return DeclaredClass(self, node)
        home = self._home(name)
        return home[0].cls(home[1]) if home is not None else None

    def classes(self) -> list[DeclaredClass]:
        """The classes that it defines."""
        return [DeclaredClass(self, node) for node in self.tree.body if isinstance(node, ast.ClassDef)]

    def literal(self, node: Any) -> Any:
        """The value of an expression.

        Raises:
            Unreadable: it is made of more than literals, names of them, and dictionaries that are joined.
        """
        match node:
            case ast.Name(id=name):
                return self.constant(name)
            case ast.Tuple(elts=parts):
                return tuple(self.literal(part) for part in parts)
            case ast.Dict(keys=keys, values=values) if None not in keys:
                return {self.literal(key): self.literal(value) for key, value in zip(keys, values, strict=True)}
            case ast.Call(func=ast.Attribute(value=ast.Name(id="dict"), attr="fromkeys"), args=[keys, value]):
                return dict.fromkeys(self.literal(keys), self.literal(value))
            case ast.BinOp(left=ast.Dict() | ast.Call() as left, op=ast.BitOr(), right=right):
                return self.literal(left) | self.literal(right)
        try:
            return ast.literal_eval(node)
        except ValueError:
            raise Unreadable(ast.dump(node)) from None

    def constant(self, name: str) -> Any:
        """The value of a constant, defined here or imported.

        Raises:
            Unreadable: no module of holdfast defines it, or it is no literal.
        """
        value = _assigned(self.tree, name)
        if isinstance(value, ast.expr):
            return self.literal(value)
        home = self._home(name)
        if home is None:
            raise Unreadable(name)
        return home[0].constant(home[1])

    @cached_property
    def _imports(self) -> dict[str, tuple[str, str]]:
        """By the name here, the module that it is imported from, and its name there."""
        inside = [node.body for node in self.tree.body if isinstance(node, ast.If)]  # for type checkers
        nodes = [node for node in (*self.tree.body, *chain(*inside)) if isinstance(node, ast.ImportFrom)]
        return {a.asname or a.name: (node.module or "", a.name) for node in nodes for a in node.names}

    def _home(self, name: str) -> tuple[Source, str] | None:
        """The module of holdfast that a name is imported from, and its name there."""
        module, original = self._imports.get(name, ("", ""))
        return (read(module), original) if module.partition(".")[0] == "holdfast" else None


@cache
def read(module: str) -> Source:
    """The source of a module of holdfast.

    Raises:
        Unreadable: there is none, as in an installation of compiled files.
    """
    path = SOURCE.joinpath(*module.split("."))
    files = [file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()]
    if not files:
        raise Unreadable(module)
    return Source(module, ast.parse(files[0].read_text(encoding="utf-8")))


def _assigned(body: ast.Module | ast.ClassDef, name: str) -> ast.expr | ast.ClassDef | None:
    """What a name is bound to in a class body or a module: an expression, or a nested class."""
    for node in body.body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in node.targets):
            return node.value
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id == name:
            return node.value
        if isinstance(node, ast.ClassDef) and node.name == name and isinstance(body, ast.ClassDef):
            return node
    return None


Fields = dict[str, tuple[str, str]]
"""Of each option (default, description); of a section that takes any option, ``model_config`` ("allow", "")."""


def _options(lineage: Sequence[DeclaredClass]) -> Fields:
    """The options of the first class that says what they are: a nested class, another class's, or a call.

    A call such as ``Options = preset(loss="kl")`` gives the options that the class inherits other defaults.
    """
    for place, cls in enumerate(lineage):
        options = _assigned(cls.node, "Options")
        match options:
            case ast.ClassDef():
                return _fields(DeclaredClass(cls.source, options))
            case ast.Name():
                return _fields_named(cls.source, options)
            case ast.Call():
                fields = _options(lineage[place + 1 :])
                for keyword in options.keywords:
                    value = cls.source.literal(keyword.value)
                    defaults = {keyword.arg: value} if keyword.arg else value
                    fields |= {key: (_shown(default), fields[key][1]) for key, default in defaults.items()}
                return fields
            case ast.expr():
                break
    raise Unreadable("Options")


def _fields(section: DeclaredClass) -> Fields:
    """The fields of a section, those that it inherits first, as pydantic has them."""
    fields: Fields = {}
    for base in section.node.bases:
        fields |= _fields_named(section.source, base)
    for node in section.node.body:
        if not isinstance(node, ast.AnnAssign) or ast.unparse(node.annotation).startswith("ClassVar"):
            continue
        if isinstance(node.target, ast.Name):
            fields[node.target.id] = _field(section.source, node.value)
    config = _assigned(section.node, "model_config")
    for keyword in config.keywords if isinstance(config, ast.Call) else ():
        if keyword.arg == "extra":
            fields["model_config"] = (section.source.literal(keyword.value), "")
    return fields


def _fields_named(source: Source, name: ast.expr) -> Fields:
    """The fields of a section that is named: ``Section``, or ``Other.Options``."""
    match name:
        case ast.Name(id="BaseModel"):
            return {}
        case ast.Name():
            if (section := source.cls(name.id)) is not None:
                return _fields(section)
        case ast.Attribute(value=ast.Name(id=owner), attr="Options"):
            if (cls := source.cls(owner)) is not None:
                return _options(cls.lineage())
    raise Unreadable(ast.unparse(name))


def _field(source: Source, value: ast.expr | None) -> tuple[str, str]:
    """(default, description) of a field; its value is a default, or ``Field(default, description=...)``."""
    if not (isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and value.func.id == "Field"):
        return (_shown(source.literal(value)) if value is not None else "required", "")
    given = {keyword.arg: keyword.value for keyword in value.keywords}
    if "default_factory" in given:
        raise Unreadable(ast.unparse(value))
    default = value.args[0] if value.args else given.get("default")
    description = source.literal(given["description"]) if "description" in given else ""
    return (_shown(source.literal(default)) if default is not None else "required", description)


def _shown(default: Any) -> str:
    try:
        return json.dumps(default)
    except TypeError:
        raise Unreadable(repr(default)) from None
