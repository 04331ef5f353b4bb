"""No text of data, names or messages is a command to the terminal, by whatever way it is printed."""

from __future__ import annotations

import io
import logging
import sys
from pathlib import Path

import pytest
from rich.table import Table

from holdfast.errors import ConfigError
from holdfast.system import terminal
from holdfast.system.progress import Progress
from holdfast.system.terminal import open_console, printable, say, show_printable_errors
from support.command import holdfast

HOSTILE = "a\x1b[31mred\x1b]0;title\x07b\x9b2Jc\rd[/x] [red]:smile:"
SHOWN = "a␛[31mred␛]0;title␇b\N{REPLACEMENT CHARACTER}2Jc␍d[/x] [red]:smile:"


def test_control_characters_are_shown():
    assert printable(HOSTILE) == SHOWN
    assert printable("tab\tline\nä 你好 😀 שלום\r\n") == "tab\tline\nä 你好 😀 שלום\n"
    assert printable("\u202eevil\ud800") == "\N{REPLACEMENT CHARACTER}evil\N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_console_prints_them_so(is_terminal):
    told = io.StringIO()
    console = open_console(file=told, force_terminal=is_terminal, width=200, no_color=True, highlight=False)
    table = Table(HOSTILE)
    table.add_row(HOSTILE)
    console.print(table)
    console.print(HOSTILE, soft_wrap=True)
    console.rule(HOSTILE)
    assert told.getvalue().count(SHOWN) == 4
    assert not set(told.getvalue().replace("\x1b[1m", "").replace("\x1b[0m", "").replace("\x1b[92m", "")) & set(
        "\x1b\x07\x9b\r"
    )


def test_a_terminal_still_has_colours():
    told = io.StringIO()
    open_console(file=told, force_terminal=True, color_system="standard").print("x", style="bold red")
    assert told.getvalue() == "\x1b[1;31mx\x1b[0m\n"


@pytest.mark.parametrize("is_terminal", [True, False])
def test_progress_prints_them_so(is_terminal, monkeypatch):
    told = io.StringIO()
    progress = Progress(open_console(file=told, force_terminal=is_terminal, width=200, highlight=False))
    progress.line(HOSTILE)
    with progress.bar(HOSTILE) as bar:
        bar.update(1, HOSTILE, total=1)
    assert SHOWN in told.getvalue() and "\x1b]0;" not in told.getvalue() and "\x9b" not in told.getvalue()


def test_messages_are_printed_so(capsys, caplog, tmp_path, monkeypatch):
    say(HOSTILE)
    assert capsys.readouterr().out == SHOWN + "\n"
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    show_printable_errors()
    logging.getLogger("holdfast").warning("of %s", HOSTILE)
    assert caplog.messages[-1] == "of " + SHOWN
    sys.excepthook(ConfigError, ConfigError(HOSTILE), None)
    assert SHOWN in capsys.readouterr().err
    (tmp_path / "c.yaml").write_text('model: m\nstream: trace\noutput: o\n"\\e[31mx\\a": 1\n')
    assert holdfast("check", tmp_path / "c.yaml") == 2
    assert "␛[31mx␇: unknown key" in capsys.readouterr().err


def test_all_that_is_printed_goes_this_way():
    package = Path(terminal.__file__).parents[1]
    for path in [*package.glob("cli/*.py"), *package.glob("system/*.py"), *package.glob("runner/*.py")]:
        text = path.read_text(encoding="utf-8").replace("console.print(", "")
        ways = [way for way in (" print(", "Console(", "typer.echo(", "sys.stderr.write") if way in text]
        assert not ways or path.name == "terminal.py", f"{path}: {ways}"
