"""The command line, run or only read in this process."""

from __future__ import annotations

from functools import cache
from typing import Any
from unittest import mock

import pytest
import typer

from holdfast.cli import app, main


def holdfast(*arguments: Any) -> int:
    """The exit code of ``holdfast ARGUMENTS``; its output is what pytest's ``capsys`` captures."""
    with mock.patch("sys.argv", ["holdfast", *map(str, arguments)]), pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


@cache
def _command() -> Any:
    return typer.main.get_command(app)


def parse(words: list[str]) -> None:
    """Raise a UsageError if `holdfast WORDS` has a command, an option or an argument that does not exist."""
    command = _command()
    context = typer.Context(command)
    while hasattr(command, "commands"):
        name, command, words = command.resolve_command(context, words)
    command.make_context(name, [word for word in words if word != "--help"])
