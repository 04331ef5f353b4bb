"""Keep a server at the stage that a run holds: load the new weights beside the old ones, then exchange them."""

from __future__ import annotations

import gc
import logging
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from holdfast.errors import UserError
from holdfast.records.read import read_run
from holdfast.records.stages import settled_stage
from holdfast.runner.reload import StoredStage
from holdfast.system.device import free_unused_memory

if TYPE_CHECKING:
    from holdfast.deploy.openai.application import Served, Service
    from holdfast.deploy.openai.exchange import Backend

logger = logging.getLogger("holdfast")

EVERY = 1.0  # seconds between two looks at the run
AGAIN = 60.0  # seconds after which a stage that could not be loaded is tried again


def held_stage(run: Path) -> int:
    """The stage that is to be served: of those that are measured and judged, the one whose weights the run holds.

    Raises:
        RunDirectoryError: there is no run, none that was measured, or it is damaged.
    """
    return settled_stage(read_run(run))


class Follower:
    """Looks at a run's directory in a thread of its own, and exchanges what a service answers with.

    Requests that have begun end on the model that they began with. A third model is not loaded before the last of
    them has ended, so that two are in memory at most. A stage that cannot be loaded leaves the old one in service.

    Args:
        stored: the stage that the service begins with.
        find: gives the stage of a number, checked.
        load: gives what answers with a stage.
        say: is told of each exchange.
    """

    def __init__(
        self,
        service: Service,
        stored: StoredStage,
        find: Callable[[int], StoredStage],
        load: Callable[[StoredStage], Backend],
        say: Callable[[str], None],
    ):
        self._service, self._run = service, stored.run.path
        self._find, self._load, self._say = find, load, say
        self._serves = _identity(stored)
        self._seen: object = None
        self._failed: tuple[object, float] = (None, 0.0)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._work, name="holdfast follower", daemon=True)

    def start(self) -> None:
        """Begin to look."""
        self._thread.start()

    def stop(self) -> None:
        """Look no more; returns when the thread has ended."""
        self._stopped.set()
        self._thread.join()

    def _work(self) -> None:
        while not self._stopped.wait(EVERY):
            try:
                self._look()
            except Exception as error:  # whatever happens to the directory, the server goes on
                logger.error("%s: cannot be followed (%s); the stage in service stays", self._run, error)

    def _look(self) -> None:
        """Exchange the model if the run holds another one by now."""
        seen, failed = _state(self._run), self._failed[0] is not None and time.monotonic() > self._failed[1]
        if seen is None or (seen == self._seen and not failed):
            return
        try:
            stored = self._find(held_stage(self._run))
        except UserError as error:  # a directory that is being exchanged is whole again in a moment
            if _state(self._run) == seen:
                self._fail(seen, str(error), seen)
            return
        if (wanted := _identity(stored)) != self._serves:
            if self._failed[0] == wanted and not failed:
                self._seen = seen
                return
            try:
                backend = self._load(stored)
            except Exception as error:
                self._fail(wanted, f"stage {stored.number} cannot be loaded: {error}", seen)
                return
            former = self._service.served.backend.name
            again = backend.name == former
            self._say(f"serves {former} as it was made again" if again else f"serves {backend.name} now, not {former}")
            self._serves = wanted
            self._retire(self._service.exchange(backend))
        self._seen, self._failed = seen, (None, 0.0)

    def _fail(self, what: object, why: str, seen: object) -> None:
        logger.error("%s: %s; %s stays in service", self._run, why, self._service.served.backend.name)
        self._seen, self._failed = seen, (what, time.monotonic() + AGAIN)

    def _retire(self, former: Served) -> None:
        """Wait until the last request of a former model has ended, and free its memory."""
        while former.inside and not self._stopped.wait(0.05):
            pass
        former.backend.threads.shutdown(wait=False)
        del former
        gc.collect()
        free_unused_memory()


def _identity(stored: StoredStage) -> tuple[int, str]:
    """What tells one stage's model from another: a rebuilt stage has the number of the one before."""
    return stored.number, stored.weights


def _state(run: Path) -> object:
    """What changes with each change of what a run holds; None while the directory is not there."""
    with suppress(OSError):
        found = [(run / name).stat() for name in ("run.json", "matrix.json")]
        return [(file.st_ino, file.st_mtime_ns, file.st_size) for file in found]
    return None
