"""Workers on a Ray cluster, like :class:`~holdfast.system.pool.Pool`; a run restarts if its machine is lost."""

from __future__ import annotations

import logging
import socket
from typing import Any

from holdfast.errors import ConfigError, Interrupted
from holdfast.sweep.plan import PlannedRun, Resources
from holdfast.sweep.work import do_run
from holdfast.system.pool import JobOutcome, WorkerDiedError


class RayPool:
    """Does runs as tasks of Ray. Every machine must see their folders."""

    def __init__(self, resources: Resources, address: str):
        """
        Args:
            resources: of one run.
            address: of the head of a cluster, or auto.

        Raises:
            ConfigError: Ray is not installed, no cluster answers there, or no machine of it has the resources.
        """
        try:
            import ray
        except ImportError:
            raise ConfigError("--ray: needs Ray: pip install 'holdfast[ray]'") from None
        try:
            _reach(address)
            ray.init(address, log_to_driver=False, logging_level=logging.ERROR, ignore_reinit_error=True)
        except OSError as error:
            raise ConfigError(f"--ray: no cluster answers at {address!r}: {error}") from None
        self._ray = ray
        cores, gpus = resources.cores * resources.processes, resources.gpus * resources.processes
        machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        if not any(m.get("CPU", 0) >= cores and m.get("GPU", 0) >= gpus for m in machines):
            raise ConfigError(f"resources: a run needs {cores:g} cores and {gpus:g} GPUs, which no machine here has")
        remote = ray.remote(num_cpus=cores, num_gpus=gpus, max_retries=resources.retries)
        self._do, self._processes = remote(do_run), resources.processes
        self._jobs: dict[Any, PlannedRun] = {}
        self._stopping = False

    @property
    def free(self) -> int:
        """How many more runs can be submitted: always one, since Ray queues what it has no room for."""
        return 0 if self._stopping else 1

    @property
    def working(self) -> int:
        """How many runs are under way or queued."""
        return len(self._jobs)

    def submit(self, key: PlannedRun, config: dict[str, Any], /) -> None:
        """Begin a run; ``key`` is a name that no other has."""
        self._jobs[self._do.remote(self._processes, config)] = key

    def wait(self, seconds: float | None = None) -> list[tuple[PlannedRun, JobOutcome]]:
        """Wait until a run is done or the time is over, and return the runs that are done, (key, outcome) of each."""
        if not self._jobs:
            return []
        ready, _ = self._ray.wait(list(self._jobs), num_returns=1, timeout=seconds)
        return [(self._jobs.pop(job), self._outcome(job)) for job in ready]

    def stop(self) -> None:
        """Ask the runs under way to save and end; no other begins."""
        self._stopping = True
        for job in self._jobs:
            self._ray.cancel(job)

    def __enter__(self) -> RayPool:
        return self

    def __exit__(self, kind: object, *error: object) -> None:
        if kind is not None:
            self.stop()
        self._ray.shutdown()

    def _outcome(self, job: Any) -> JobOutcome:
        errors = self._ray.exceptions
        try:
            return JobOutcome(self._ray.get(job))
        except errors.TaskCancelledError:
            return JobOutcome(error=Interrupted("stopped"))
        except errors.RayTaskError as error:
            cause = error.cause
            if self._stopping and isinstance(cause, KeyboardInterrupt):
                return JobOutcome(error=Interrupted("stopped"))
            return JobOutcome(error=cause if isinstance(cause, Exception) else RuntimeError(str(error)))
        except errors.RayError as error:
            return JobOutcome(error=WorkerDiedError(f"its machine or process was lost: {str(error).splitlines()[0]}"))


def _reach(address: str) -> None:
    """Raise OSError if nothing listens at a host:port; Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host, int(port)), timeout=10).close()
