"""Where this process computes: on the GPU that torch finds (CUDA, ROCm, XPU, Apple's), or else on the processor."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

NO_FLOAT64 = frozenset({"mps"})
"""Types of devices that hold no float64."""

VISIBLE = {"cuda": "CUDA_VISIBLE_DEVICES", "xpu": "ZE_AFFINITY_MASK"}
"""The variable that says which GPUs a process sees."""


def device_type() -> str:
    """The type of the device as torch names it: cuda (ROCm too), xpu, mps or another accelerator's, or cpu.

    The switch of transformers' Trainer, ``ACCELERATE_USE_CPU=1``, makes it cpu.
    """
    import torch

    if os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes", "on", "y", "t"):
        return "cpu"
    found = torch.accelerator.current_accelerator(check_available=True)
    return found.type if found else "cpu"


def on_gpu() -> bool:
    """Whether this process computes on a GPU or another accelerator."""
    return device_type() != "cpu"


def gpu_count() -> int:
    """How many GPUs this process sees."""
    return int(_module().device_count()) if on_gpu() else 0


def gpu_name(index: int = 0) -> str:
    """A GPU's name as its maker gives it; of makers that give none, the type of the device."""
    name = getattr(_module(), "get_device_name", None)
    return str(name(index)) if name else f"{device_type()} {index}"


def gpu_has_bfloat16() -> bool:
    """Whether this process computes on a GPU that has instructions for bfloat16."""
    import torch

    if device_type() == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device_type() == "mps":
        return bool(torch.backends.mps.is_macos_or_newer(14, 0))
    return on_gpu() and bool(getattr(_module(), "is_bf16_supported", bool)())


def free_gpu_memory() -> int:
    """Free bytes of the first GPU; of an Apple GPU, what the system recommends less what this process holds."""
    if device_type() == "mps":
        return int(_module().recommended_max_memory() - _module().driver_allocated_memory())
    return int(_module().mem_get_info(0)[0])


def gpu_memory() -> int:
    """Bytes of the first GPU, in use or not; of an Apple GPU, what the system recommends to use."""
    return int(_module().recommended_max_memory() if device_type() == "mps" else _module().mem_get_info(0)[1])


def reset_gpu_peak() -> None:
    """Begin to measure :func:`gpu_peak` anew; an Apple GPU counts no peak."""
    if device_type() != "mps":
        _module().reset_peak_memory_stats()


def gpu_peak() -> int:
    """Most bytes that this process held on its GPU since :func:`reset_gpu_peak`; of an Apple GPU, those held now."""
    return int(_module().driver_allocated_memory() if device_type() == "mps" else _module().max_memory_allocated())


def free_unused_memory() -> None:
    """Give the GPU's memory back that is cached and holds nothing."""
    if on_gpu():
        _module().empty_cache()


def to_float64(values: Tensor) -> Tensor:
    """Values in float64, on their device, or on the CPU if their device holds no float64."""
    return (values.cpu() if values.device.type in NO_FLOAT64 else values).double()


def _module() -> Any:
    import torch

    return torch.get_device_module(device_type())
