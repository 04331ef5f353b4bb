"""YAML text to plain values. What is no plain value is refused in one line, whatever the text holds."""

from __future__ import annotations

import re
from typing import Any

import yaml

MOST_BYTES = 10_000_000
"""A longer file is no configuration."""

MOST_VALUES = 100_000
"""A text may hold so many values, where each alias counts as all that it stands for."""

DEEPEST = 100
"""Lists and mappings may stand so deep in each other."""

MOST_DIGITS = 300
"""A number may have so many digits."""


class YamlError(ValueError):
    """The text is no YAML, or holds what no configuration can; the message names the line.

    Attributes:
        syntax: whether it is no YAML at all.
    """

    def __init__(self, message: str, mark: Any = None, *, syntax: bool = False):
        super().__init__(f"line {mark.line + 1}: {message}" if mark is not None else message)
        self.syntax = syntax


class _Loader(yaml.SafeLoader):
    """Safe YAML that also reads 3e-4 as a number, leaves dates as text, and expands no bomb of aliases."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - as PyYAML has it
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def __init__(self, text: str):
        super().__init__(text)
        self._sizes: dict[yaml.Node, int] = {}
        self._depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        named = self.anchors.get(event.anchor) if isinstance(event, yaml.AliasEvent) else None
        if named is not None and named not in self._sizes:
            raise YamlError(f"*{event.anchor} stands for a value that it is a part of", event.start_mark)
        self._depth += 1
        if self._depth > DEEPEST:
            raise YamlError(f"is nested too deeply: {DEEPEST} levels at most", event.start_mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        if node is not None and node not in self._sizes:
            size = 1 + sum(self._sizes[below] for below in _below(node))
            if size > MOST_VALUES:
                raise YamlError(f"holds more than {MOST_VALUES:,} values, with its aliases expanded", node.start_mark)
            self._sizes[node] = size
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        lines: dict[Any, int] = {}
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                name = self.construct_object(key)
                if name in lines:
                    raise YamlError(f"the key {key.value!r} stands in line {lines[name]} already", key.start_mark)
                lines[name] = key.start_mark.line + 1
        return super().construct_mapping(node, deep)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        if isinstance(node, yaml.ScalarNode):
            if node.tag in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float") and len(node.value) > MOST_DIGITS:
                raise YamlError(f"a number of {len(node.value)} digits; {MOST_DIGITS} at most", node.start_mark)
            refuse_unusable(node.value, node.start_mark)
        try:
            return super().construct_object(node, deep)
        except (ValueError, TypeError, KeyError, IndexError) as error:
            if isinstance(error, YamlError):
                raise
            kind = node.tag.rpartition(":")[2]
            raise YamlError(f"{str(node.value)!r:.60} is no {kind}", node.start_mark) from None


_UNUSABLE = re.compile("[\0\ud800-\udfff]")
"""Half a pair of surrogates, which no encoding writes, and the end of a path."""

_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def _below(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]
    return node.value if isinstance(node, yaml.SequenceNode) else []


def refuse_unusable(text: str, mark: yaml.Mark | None = None) -> None:
    """Raise YamlError if a text holds a character that no file or path can."""
    if bad := _UNUSABLE.search(text):
        raise YamlError(f"the character U+{ord(bad.group()):04X} belongs to no text", mark)


def as_yaml(value: Any) -> str:
    """A value as a message shows it: true, false and null in YAML's words, text in quotes."""
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case dict():
            return "{" + ", ".join(f"{key}: {as_yaml(below)}" for key, below in value.items()) + "}"
        case list() | tuple():
            return "[" + ", ".join(map(as_yaml, value)) + "]"
    return repr(value)


def parse_yaml(text: str) -> Any:
    """The value that a YAML text holds.

    Raises:
        YamlError: it is no YAML; a key stands twice; a value is none of its type (a number of too many digits, half a
            surrogate); it is nested too deeply, or too large where its aliases are expanded.
    """
    refuse_unusable(text)
    loader = None
    try:
        loader = _Loader(text)
        return loader.get_single_data()
    except RecursionError:
        raise YamlError("is nested too deeply") from None
    except yaml.MarkedYAMLError as error:
        said = error.problem or str(error)
        syntax = not isinstance(error, yaml.constructor.ConstructorError)
        raise YamlError(said, error.problem_mark, syntax=syntax) from None
    except yaml.YAMLError as error:
        raise YamlError(" ".join(str(error).split()), syntax=True) from None
    finally:
        if loader is not None:
            loader.dispose()
