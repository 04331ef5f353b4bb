"""Work on parts in several processes; the results come in the order of the parts."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from multiprocessing import connection, get_context
from typing import Any, Generic, Literal, NamedTuple, TypeVar

from holdfast.system.machine import cores

MOST = 8
"""Processes, each of which takes memory."""

Part = TypeVar("Part")
Given = TypeVar("Given")
Result = TypeVar("Result")


def forks() -> int:
    """How many forked processes may work beside each other, of this one and those that train with it; 1: none."""
    share = cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(share, MOST)) if sys.platform == "linux" else 1


def in_order(
    parts: Iterable[Part],
    load: Callable[[], Callable[[Given], Result]],
    processes: int,
    *,
    given: Callable[[Part], Given],
    start: Literal["spawn", "fork"] = "spawn",
) -> Iterator[tuple[Part, Result]]:
    """Give each part with what the work makes of it.

    Args:
        parts: taken one at a time, no more of them ahead than there are processes.
        load: makes the work, once in each process.
        given: what the work is given of a part.
        processes: with 1, this one does it; else so many others, of which none outlives this one.
        start: spawn: parts and ``load`` are pickled. fork: ``load`` sees what this process has in memory.

    Raises:
        RuntimeError: one of the processes was killed.
    """
    if processes == 1:
        work = load()
        for part in parts:
            yield part, work(given(part))
        return
    busy: deque[tuple[_Worker[Given, Result], Part]] = deque()
    with contextlib.ExitStack() as stack:
        for part in parts:
            done = None
            if len(busy) < processes:
                worker = stack.enter_context(_Worker(load, start))
            else:
                worker, earlier = busy.popleft()
                done = earlier, worker.receive()
            worker.send(given(part))
            busy.append((worker, part))
            if done:
                yield done
        for worker, earlier in busy:
            yield earlier, worker.receive()


class _Failure(NamedTuple):
    """What the work raised."""

    error: Exception


class _Worker(Generic[Given, Result]):
    """A process that works on one part at a time; it ends when its pipe closes, so also when this process is killed."""

    def __init__(self, load: Callable[[], Callable[[Given], Result]], start: Literal["spawn", "fork"]):
        context: Any = get_context(start)
        self._pipe, theirs = context.Pipe()
        inherited = self._pipe if start == "fork" else None
        self._process = context.Process(target=_work, args=(load, theirs, inherited), daemon=True)
        with warnings.catch_warnings():  # of threads, which a fork has not; the work here needs none of them
            warnings.filterwarnings("ignore", message=".*multi-threaded, use of fork", category=DeprecationWarning)
            self._process.start()
        theirs.close()

    def __enter__(self) -> _Worker[Given, Result]:
        return self

    def __exit__(self, *error: object) -> None:
        self._pipe.close()
        self._process.join()

    def send(self, given: Given) -> None:
        try:
            self._pipe.send(given)
        except OSError:
            raise self._gone() from None

    def receive(self) -> Result:
        try:
            result: Any = self._pipe.recv()
        except (EOFError, OSError):
            raise self._gone() from None
        if isinstance(result, _Failure):
            raise result.error
        return result

    def _gone(self) -> RuntimeError:
        self._process.join()
        return RuntimeError(
            f"a process that tokenises ended with exit code {self._process.exitcode}; -9 often means that the memory "
            "was full, and fewer processes need less"
        )


def _work(
    load: Callable[[], Callable[[Any], Any]], pipe: connection.Connection, inherited: connection.Connection | None
) -> None:
    if inherited is not None:
        inherited.close()  # else the pipe would have an end here when the first process has gone
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of a terminal; the first one decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    logging.disable()  # warnings are the first process's
    work = load()
    with contextlib.suppress(EOFError, OSError):
        while True:
            part = pipe.recv()
            try:
                result = work(part)
            except Exception as error:
                result = _Failure(error)
            pipe.send(result)
