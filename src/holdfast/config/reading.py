"""Read a configuration from YAML or a mapping, with overrides; each error names its key and, for a typo, a near key."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from holdfast.config.wording import in_words
from holdfast.config.yaml_values import MOST_BYTES, YamlError, as_yaml, parse_yaml, refuse_unusable
from holdfast.errors import ConfigError

Model = TypeVar("Model", bound=BaseModel)


def load(
    cls: type[Model],
    source: str | Path | dict[str, Any],
    overrides: list[str] | None = None,
    where: str = "the configuration",
) -> Model:
    """Read a configuration of any class.

    Args:
        cls: the configuration's class.
        source: a YAML file, or the mapping that such a file holds.
        overrides: ``key.path=value`` strings; values are YAML.
        where: the origin of a mapping, for messages.

    Raises:
        ConfigError: a key is unknown, missing or wrong; the message names it and a near name.
    """
    if not isinstance(source, dict):
        where = str(source)
    return validate(cls, read_values(source, overrides), where)


def read_values(source: str | Path | dict[str, Any], overrides: list[str] | None = None) -> dict[str, Any]:
    """The mapping of a YAML file, or a mapping itself, with overrides; its keys are not checked.

    Raises:
        ConfigError: the file cannot be read, or an override is none.
    """
    values = dict(source) if isinstance(source, dict) else read_yaml(Path(source))
    for override in overrides or []:
        _apply_override(values, override)
    return values


def validate(cls: type[Model], values: dict[str, Any], where: str) -> Model:
    """Build a pydantic model from a user's mapping.

    Raises:
        ConfigError: one line for each error, with its key and, for a typo, a near name.
    """
    try:
        return cls.model_validate(values)
    except ValidationError as error:
        lines = in_words(cls, values, error.errors())
        raise ConfigError("\n".join(f"{where}: {line}" for line in lines)) from None


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping.

    Raises:
        ConfigError: the file is absent, cannot be read, or holds no mapping of names to plain values.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
        if len(content) > MOST_BYTES:
            raise ConfigError(f"{path}: has more than {MOST_BYTES:,} bytes, so it is no configuration")
        values = parse_yaml(content.decode("utf-8-sig"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such file") from None
    except IsADirectoryError:
        raise ConfigError(f"{path}: is a folder, not a YAML file") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 (byte {error.start})") from None
    except YamlError as error:
        raise ConfigError(f"{path}: {'is not valid YAML: ' if error.syntax else ''}{error}") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"{str(path)!r}: is no path of a file: {error}") from None
    if values is None:
        raise ConfigError(f"{path}: is empty; it must hold keys with their values, such as seed: 1")
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: must be a mapping of keys to values, such as seed: 1, not {as_yaml(values):.60}")
    return values


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(
            f"{override!r}: an override is key.path=value, for example training.epochs=3; in a shell, a value with "
            "spaces or braces stands in quotes: 'method={name: replay, ratio: 0.3}'"
        )
    try:
        refuse_unusable(key)
        value = parse_yaml(text)
    except YamlError as error:
        if not error.syntax:
            raise ConfigError(f"{override!r:.200}: {error}") from None
        value = text
    try:
        set_key(values, key, value)
    except ConfigError as error:
        raise ConfigError(f"{override!r:.200}: {error}") from None


def set_key(values: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key of a mapping in place, as ``key=value`` on the command line does.

    Raises:
        ConfigError: a part of the key is not a section.
    """
    *parents, last = key.split(".")
    for parent in parents:
        below = values.get(parent)
        if isinstance(below, str) and parent in ("model", "tuner", "method", "stream"):
            below = {"name": below}
        if below is not None and not isinstance(below, dict):
            raise ConfigError(f"{parent} is not a section but {as_yaml(below):.200}")
        values[parent] = below = dict(below or {})
        values = below
    values[last] = value
