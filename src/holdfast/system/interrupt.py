"""SIGINT and SIGTERM: the first one asks the run to save and end, a second one ends it at once."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from holdfast.errors import Interrupted
from holdfast.system.progress import Progress

HEARD = "\nholdfast: stops as soon as it can save; a second Ctrl-C ends it at once, without saving\n"


class Interrupt:
    """A context in which the first SIGINT or SIGTERM sets ``requested``, and that of the contexts around it; a second
    one ends the process at once."""

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            if signal.getsignal(number) == self._request:  # else it came, and the next one ends the process
                signal.signal(number, handler)

    def check(self, what: str) -> None:
        """Raise Interrupted if a signal came: ``what`` is stopped, whose work so far may be done again."""
        if self.requested:
            raise Interrupted(f"stopped {what}; all before that is saved")

    @contextmanager
    def bar(self, progress: Progress, title: str) -> Iterator[Callable[[int, int], None]]:
        """Show a bar for a piece of work that can be stopped, also before it begins.

        Yields:
            a function to call with the steps done and all steps. It moves the bar, and raises Interrupted if a signal
            came, unless all is done: then what was made can be kept.
        """
        self.check(f"before {title!r}")
        with progress.bar(title) as bar:

            def on_batch(done: int, total: int) -> None:
                bar.update(done, total=total)
                if done < total:
                    self.check(f"in {title!r} after {done} of {total}")

            yield on_batch

    def _request(self, number: int, frame: FrameType | None) -> None:
        before = self._hear(number)
        if number == signal.SIGINT and before != signal.SIG_IGN:  # else Ctrl-C is for the process that began this one
            os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, HEARD.encode())  # no lock, as in any handler

    def _hear(self, number: int) -> Any:
        """Take a request, and let the next signal do what it did before all contexts, which is returned."""
        self.requested = True
        before = self._before[number]
        signal.signal(number, before)
        outer = getattr(before, "__self__", None)
        return outer._hear(number) if isinstance(outer, Interrupt) else before
