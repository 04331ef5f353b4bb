"""The progress of a run: bars in a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from holdfast.system.terminal import open_console

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as Bars

SECONDS_BETWEEN_LINES = 2.0
SECONDS_BETWEEN_PARTS = 10.0  # lines about work within a piece of work
SECONDS_BETWEEN_COUNTS = 30.0  # if the total is not known


@dataclass(frozen=True)
class Later:
    """What follows a piece of work: further steps like its own, and work whose time is known.

    Attributes:
        steps: further steps.
        known: seconds of the rest.
    """

    steps: int
    known: float

    def seconds(self, pace: float) -> float:
        """All of it, at ``pace`` seconds a step."""
        return pace * self.steps + self.known


class Bar:
    """The progress of one piece of work."""

    def __init__(self, progress: Progress, title: str, bars: Bars | None, between: float = SECONDS_BETWEEN_LINES):
        self._progress, self._title, self._bars, self._between = progress, title, bars, between
        self._task = bars.add_task(title, total=None, note="") if bars is not None else None
        self._printed = time.monotonic()
        self._tenth = 0
        self._first: tuple[float, int] | None = None  # when the first update came, and how many steps were done by then

    def update(self, done: int, note: str = "", *, total: int | None, later: Later | None = None) -> None:
        """Show that ``done`` of ``total`` steps are done, and a short note; a total of None is not known.

        Args:
            later: what follows this work, whose time is told too.
        """
        now = time.monotonic()
        self._first = self._first or (now, done)
        pace = self._pace(now, done)
        whole = ""
        if later is not None and pace is not None and total is not None:
            whole = f"run {clock(pace * (total - done) + later.seconds(pace))} left"
        if self._bars is not None and self._task is not None:
            note = "  ".join(filter(None, (note, whole)))
            self._bars.update(self._task, completed=done, total=total, note=note)
            return
        if total is None:
            if now - self._printed >= SECONDS_BETWEEN_COUNTS:
                self._printed = now
                self._progress.line(f"{self._title}  {done}  {note}")
            return
        tenth = 10 * done // total
        known = pace is not None or done >= total  # a line says how long it still takes
        if known and tenth > self._tenth and now - self._printed >= self._between:
            self._tenth, self._printed = tenth, now
            left = "" if pace is None else f"{clock(pace * (total - done))} left"
            parts = (self._title, f"{done}/{total}", note, "done" if done >= total else left, whole)
            self._progress.line("  ".join(part for part in parts if part))

    @contextlib.contextmanager
    def part(self, title: str) -> Iterator[Callable[[int, int], None]]:
        """Show some work within this one while it lasts; gives a function to call with the steps done and all steps."""
        part = Bar(self._progress, f"{self._title}: {title}", self._bars, SECONDS_BETWEEN_PARTS)
        try:
            yield lambda done, total: part.update(done, total=total)
        finally:
            if part._bars is not None and part._task is not None:
                part._bars.remove_task(part._task)

    def _pace(self, now: float, done: int) -> float | None:
        """Seconds a step since the first update, of which nobody knows how many steps it stands for."""
        assert self._first is not None
        start, before = self._first
        return (now - start) / (done - before) if done > before else None


class Progress:
    """Prints to standard error, since standard output is for results; with ``quiet``, nothing."""

    def __init__(self, console: Console | None = None, quiet: bool = False):
        self.console = console or open_console(stderr=True, quiet=quiet, highlight=False)

    def line(self, text: str) -> None:
        """Print one line."""
        self.console.print(text, markup=False, soft_wrap=True)

    @contextlib.contextmanager
    def bar(self, title: str) -> Iterator[Bar]:
        """A bar for one piece of work."""
        if not self.console.is_terminal or self.console.quiet:
            yield Bar(self, title, None)
            return
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bars

        columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
        with Bars(
            *columns, TextColumn("{task.fields[note]}", markup=False), TimeRemainingColumn(), console=self.console
        ) as bars:
            yield Bar(self, title, bars)


def clock(seconds: float) -> str:
    """Seconds as 1:05 or 2:03:04."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


OnBatch = Callable[[int, int], None] | None

Show = Callable[[str], contextlib.AbstractContextManager[Callable[[int, int], None]]]
"""Shows work of a title while it lasts; gives a function to call with the steps done and all steps."""


@contextlib.contextmanager
def silent(title: str) -> Iterator[Callable[[int, int], None]]:
    """A :data:`Show` that shows nothing."""
    yield lambda done, total: None
