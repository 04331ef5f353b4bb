"""What a stage's training costs: tokens, seconds and peak memory. Counting goes on after a restart."""

from __future__ import annotations

import contextlib
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from holdfast.system.device import gpu_peak, on_gpu, reset_gpu_peak

if TYPE_CHECKING:
    from holdfast.engines.process import Process


class Cost:
    """Counters that run between :meth:`start` and :meth:`stop`; with ``load(state())`` another process goes on.

    Attributes:
        tokens: tokens that went through a forward pass of training: with rehearsal rows, without padding.
    """

    def __init__(self) -> None:
        self.tokens = 0
        self._seconds = self._peak_gib = 0.0
        self._since: float | None = None

    def start(self) -> None:
        """Start the counters; the peak of memory is measured from here on."""
        _reset_peak()
        self._since = time.monotonic()

    def stop(self) -> None:
        """Stop the counters; they keep their values."""
        self._seconds, self._peak_gib, self._since = self.seconds, self.peak_memory_gib, None

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Pause the counters, for work that is not training."""
        self.stop()
        try:
            yield
        finally:
            self.start()

    @property
    def seconds(self) -> float:
        """Seconds of training."""
        return self._seconds + (0.0 if self._since is None else time.monotonic() - self._since)

    @property
    def peak_memory_gib(self) -> float:
        """Peak memory in GiB: of the GPU where there is one, otherwise of this process."""
        return self._peak_gib if self._since is None else max(self._peak_gib, _peak_gib())

    def state(self) -> dict[str, Any]:
        """``tokens``, ``seconds`` and ``peak_memory_gib`` as plain values."""
        return {
            "tokens": self.tokens,
            "seconds": round(self.seconds, 3),
            "peak_memory_gib": round(self.peak_memory_gib, 3),
        }

    def of_all(self, process: Process) -> dict[str, Any]:
        """:meth:`state` over all processes: the sum of tokens, the longest time and the highest peak."""
        states = process.gather(self.state())
        return {
            "tokens": sum(state["tokens"] for state in states),
            "seconds": max(state["seconds"] for state in states),
            "peak_memory_gib": max(state["peak_memory_gib"] for state in states),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on from the values that :meth:`state` gave."""
        self.tokens, self._seconds, self._peak_gib = state["tokens"], state["seconds"], state["peak_memory_gib"]


STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def _reset_peak() -> None:
    if on_gpu():
        reset_gpu_peak()
    elif RESET.exists():
        with contextlib.suppress(OSError):  # where a container forbids it, the peak is that since the process began
            RESET.write_text("5")


def _peak_gib() -> float:
    if on_gpu():
        return gpu_peak() / 2**30
    if STATUS.exists():
        for line in STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20  # bytes on macOS, KiB elsewhere
