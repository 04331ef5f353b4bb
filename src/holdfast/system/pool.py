"""A pool of worker processes that outlives any of them: a job that fails, or whose process dies, is told of as such."""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from typing import Any

from holdfast.errors import Interrupted


class WorkerDiedError(RuntimeError):
    """The process that did a job ended before the job did."""


@dataclass(frozen=True)
class JobOutcome:
    """What became of a job: its value, or the error that it raised."""

    value: Any = None
    error: Exception | None = None

    def result(self) -> Any:
        """The value; raises the error."""
        if self.error is not None:
            raise self.error
        return self.value


class Pool:
    """Jobs in processes of their own, as many at a time as there are workers.

    A worker starts with the first job that needs it, does one after another, and is replaced where it died.
    """

    def __init__(self, do: Callable[..., Any], workers: Sequence[dict[str, str]]):
        """
        Args:
            do: does a job; a function of a module, which is imported in the worker alone.
            workers: of each, what its environment has beside this process's, CUDA_VISIBLE_DEVICES for example.
        """
        self._do, self._environments = do, workers
        self._workers: list[_Worker | None] = [None] * len(workers)
        self._stopping = False

    @property
    def free(self) -> int:
        """How many more jobs can be submitted."""
        return 0 if self._stopping else len(self._workers) - self.working

    @property
    def working(self) -> int:
        """How many jobs are under way."""
        return sum(worker is not None and worker.key is not None for worker in self._workers)

    def submit(self, key: Any, *arguments: Any) -> None:
        """Begin a job under a name of its own; there must be a free worker."""
        place = next(i for i, worker in enumerate(self._workers) if worker is None or worker.key is None)
        worker = self._workers[place]
        if worker is None or not worker.process.is_alive():
            worker = self._workers[place] = _Worker(self._environments[place])
        worker.key = key
        worker.connection.send((self._do, arguments))

    def wait(self, seconds: float | None = None) -> list[tuple[Any, JobOutcome]]:
        """The jobs that are done by now, once there is one or the time is over."""
        busy: dict[Any, int] = {
            w.connection: place for place, w in enumerate(self._workers) if w is not None and w.key is not None
        }
        finished = []
        for connection in wait(list(busy), seconds):
            worker = self._workers[busy[connection]]
            assert isinstance(worker, _Worker)
            key, worker.key = worker.key, None
            try:
                outcome = JobOutcome(*worker.connection.recv())
            except (EOFError, ConnectionError):
                worker.process.join()
                self._workers[busy[connection]] = None
                outcome = JobOutcome(error=self._death(worker.process.exitcode or 0))
            finished.append((key, outcome))
        return finished

    def stop(self) -> None:
        """Ask the jobs under way to save and leave; nothing else begins."""
        self._stopping = True
        for worker in self._workers:
            if worker is not None and worker.key is not None:
                worker.process.terminate()

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, kind: object, *error: object) -> None:
        if kind is not None:
            self.stop()
        for worker in self._workers:
            if worker is not None:
                worker.connection.close()
        for worker in self._workers:
            if worker is not None:
                worker.process.join()

    def _death(self, code: int) -> Exception:
        if self._stopping:
            return Interrupted("stopped before it had begun")
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return WorkerDiedError(f"its process {how}")


class _Worker:
    """A process and the way to it. ``key`` names its job."""

    def __init__(self, environment: dict[str, str]):
        context = get_context("spawn")
        self.connection, other = context.Pipe()
        self.process = context.Process(target=_serve, args=(other, environment))
        self.process.start()
        other.close()
        self.key: Any = None


def _serve(connection: Connection, environment: dict[str, str]) -> None:
    """What a worker does: job after job, until there is nobody to ask. Ctrl-C is for the process that asks."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ |= environment  # before a job imports torch
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            do, arguments = connection.recv()
            try:
                connection.send((do(*arguments), None))
            except Exception as error:
                connection.send((None, _sendable(error)))


def _sendable(error: Exception) -> Exception:
    """The error with its traceback as a note, or what it said where it cannot be sent."""
    text = traceback.format_exc()
    try:
        copy = pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(text)
    if not getattr(copy, "__notes__", None):
        copy.add_note(text)
    return copy
