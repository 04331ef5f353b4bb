"""This machine: versions, hardware, cores, free disk space and ports."""

from __future__ import annotations

import os
import platform
import shutil
import socket
import sys
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from holdfast.system.device import gpu_count, gpu_name
from holdfast.version import __version__


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that a run's numbers depend on."""
    names = ("torch", "transformers", "peft", "accelerate", "datasets", "tokenizers", "numpy")
    ours = {"python": platform.python_version(), "holdfast": __version__}
    return ours | {name: _installed(name) for name in names}


@cache
def _installed(library: str) -> str:
    """The version of a library; its files are read once, which takes some ms."""
    return metadata.version(library)


def hardware() -> dict[str, Any]:
    """Processor, cores, memory in GiB and GPUs of this machine."""

    return {
        "cpu": _cpu_name(),
        "cores": cores(),
        "memory_gib": _memory_gib(),
        "gpus": [gpu_name(i) for i in range(gpu_count())],
    }


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def free_port() -> int:
    """A TCP port of this machine that nothing listens on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def free_gib(path: Path) -> float:
    """Free disk space in GiB at a path, which need not exist."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free / 2**30


def processor_flags() -> set[str]:
    """The processor's extensions, as Linux names them (``avx512_bf16``); empty where the system does not say."""
    return set(_processor("flags").split())


def _cpu_name() -> str:
    return _processor("model name") or platform.processor() or platform.machine()


def _processor(key: str) -> str:
    """What Linux says of the first core; empty where it says nothing."""
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith(key):
                return line.split(":", 1)[1].strip()
    return ""


def _memory_gib() -> float:
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
