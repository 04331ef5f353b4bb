"""A text written where a user asks: whole, or to a device such as /dev/stdout, and never over a run's records."""

from __future__ import annotations

from pathlib import Path

from holdfast.errors import ConfigError
from holdfast.system.files import write_text

DEVICES = Path("/dev")
PAGES = (".html", ".md", ".xml")
"""Endings of what a user may replace in a run's directory."""
RECORDS = (".json", ".jsonl")
"""Endings that only a run's own files have there."""
DEPTH = 5
"""A run's file lies at most so many folders below its directory."""


def write_output(path: Path, text: str) -> None:
    """Write a text to a file that a user named.

    Raises:
        ConfigError: it is a folder, cannot be written, or belongs to a run.
    """
    if path.is_dir():
        raise ConfigError(f"{path}: is a folder; name a file in it")
    device = DEVICES in path.absolute().parents or (path.exists() and not path.is_file())
    if not device:
        _refuse_records(path)
    try:
        if device:
            with path.open("w", encoding="utf-8") as file:
                file.write(text)
        else:
            write_text(path.resolve(), text)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror}") from None


def _refuse_records(path: Path) -> None:
    """Raise ConfigError if a run would lose a file of its own, or get one that is not its own."""
    suffix = path.suffix.lower()
    if suffix in PAGES or not (path.exists() or suffix in RECORDS):
        return
    for folder in path.resolve().parents[:DEPTH]:
        if (folder / "run.json").is_file():
            raise ConfigError(f"{path}: would be a file of the run in {folder}; name one that ends with {PAGES[0]}")
