"""A pool of worker processes that outlives each of them; it reports a job that failed or whose process died."""

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
from typing import Any, Generic, TypeVar

from holdfast.errors import Interrupted

Key = TypeVar("Key")


def exit_in_words(code: int) -> str:
    """How a process ended, from its exit code."""
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


class WorkerDiedError(RuntimeError):
    """The process that did a job ended before the job did."""


@dataclass(frozen=True)
class JobOutcome:
    """The value of a job, or the error that it raised."""

    value: Any = None
    error: Exception | None = None

    def result(self) -> Any:
        """Return the value, or raise the error."""
        if self.error is not None:
            raise self.error
        return self.value


class Pool(Generic[Key]):
    """Runs jobs in worker processes, as many at a time as there are workers.

    A worker starts with the first job that needs it, does one job after another, and is replaced if it died.
    """

    def __init__(self, do: Callable[..., Any], workers: Sequence[dict[str, str]]):
        """
        Args:
            do: does a job; a function of a module, so that only the worker imports it.
            workers: for each worker its further environment variables, such as CUDA_VISIBLE_DEVICES.
        """
        self._do, self._environments = do, workers
        self._workers: list[_Worker[Key] | None] = [None] * len(workers)
        self._stopping = False

    @property
    def free(self) -> int:
        """How many more jobs can be submitted."""
        return 0 if self._stopping else len(self._workers) - self.working

    @property
    def working(self) -> int:
        """How many jobs are under way."""
        return sum(worker is not None and worker.key is not None for worker in self._workers)

    def submit(self, key: Key, *arguments: Any) -> None:
        """Begin a job.

        Args:
            key: a name that no other job has.
            arguments: of the job; there must be a free worker.
        """
        place = next(i for i, worker in enumerate(self._workers) if worker is None or worker.key is None)
        worker = self._workers[place]
        if worker is None or not worker.process.is_alive():
            worker = self._workers[place] = _Worker(self._environments[place])
        worker.key = key
        worker.connection.send((self._do, arguments))

    def wait(self, seconds: float | None = None) -> list[tuple[Key, JobOutcome]]:
        """Wait until a job is done or the time is over, and return the jobs that are done, (key, outcome) of each."""
        busy: dict[Any, int] = {
            w.connection: place for place, w in enumerate(self._workers) if w is not None and w.key is not None
        }
        finished = []
        for connection in wait(list(busy), seconds):
            worker = self._workers[busy[connection]]
            assert worker is not None and worker.key is not None
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
        """Ask the jobs under way to save and end; no other job begins."""
        self._stopping = True
        for worker in self._workers:
            if worker is not None and worker.key is not None:
                worker.process.terminate()

    def __enter__(self) -> Pool[Key]:
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
        return WorkerDiedError(f"its process {exit_in_words(code)}")


class _Worker(Generic[Key]):
    """A process and the connection to it. ``key`` names its job; None: it has none."""

    def __init__(self, environment: dict[str, str]):
        context = get_context("spawn")
        self.connection, other = context.Pipe()
        self.process = context.Process(target=_serve, args=(other, environment))
        self.process.start()
        other.close()
        self.key: Key | None = None


def _serve(connection: Connection, environment: dict[str, str]) -> None:
    """Do one job after another, until the pool closes the connection; Ctrl-C is left to the pool's process."""
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
    """The error with its traceback as a note, or its traceback alone if it cannot be pickled."""
    text = traceback.format_exc()
    try:
        copy = pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(text)
    if not getattr(copy, "__notes__", None):
        copy.add_note(text)
    return copy
