"""What is printed: text from data, names and messages never reaches a terminal as a command to it."""

from __future__ import annotations

import logging
import re
import sys
import traceback
from functools import cache
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.console import Console

_COMMAND = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters but the tab and the line feed, those that turn the direction of writing, and halves of pairs."""


def printable(text: str) -> str:
    """A text whose control characters are shown, not obeyed: ESC as ␛, for example."""
    return _COMMAND.sub(_shown, text.replace("\r\n", "\n"))


def _shown(match: re.Match[str]) -> str:
    code = ord(match.group())
    if code < 0x20:
        return chr(0x2400 + code)
    return "␡" if code == 0x7F else "\N{REPLACEMENT CHARACTER}"


def say(*values: Any, end: str = "\n", file: TextIO | None = None) -> None:
    """Print values to standard output or another file, printable."""
    print(printable(" ".join(map(str, values))), end=end, file=file)


def open_console(**options: Any) -> Console:
    """A console of rich's that shows what it is given: no markup, no emoji by name, no control characters."""
    return _console_class()(markup=False, emoji=False, **options)


@cache
def _console_class() -> type[Console]:
    from rich.console import Console  # here, since most commands print without it
    from rich.segment import Segment

    class Printable(Console):
        """Makes strings printable before they are laid out, and whatever is left after."""

        def render_str(self, text: str, **options: Any) -> Any:
            return super().render_str(printable(text), **options)

        def render(self, renderable: Any, options: Any = None) -> Any:
            for segment in super().render(renderable, options):
                yield segment if segment.control else Segment(printable(segment.text), segment.style)

    return Printable


def show_printable_errors() -> None:
    """From now on, warnings of holdfast and tracebacks are printable."""
    logger = logging.getLogger("holdfast")
    if _make_printable not in logger.filters:
        logger.addFilter(_make_printable)
    sys.excepthook = _print_traceback


def _make_printable(record: logging.LogRecord) -> bool:
    record.msg, record.args = printable(record.getMessage()), ()
    return True


def _print_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    say("".join(traceback.format_exception(kind, error, trace)), end="", file=sys.stderr)
