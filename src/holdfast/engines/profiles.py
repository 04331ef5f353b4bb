"""The engines by name: DeepSpeed's configurations, and what each engine needs installed."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from typing import Any

from holdfast.errors import ConfigError

_DEEPSPEED: dict[str, Any] = {
    # "auto": transformers fills it in from the run's own settings, or from the model's hidden size.
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    # The run's own optimizer, with offload too: DeepSpeed's need a C++ compiler where the run starts.
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
}

_STAGE3: dict[str, Any] = {
    "stage": 3,
    "reduce_bucket_size": "auto",
    "stage3_prefetch_bucket_size": "auto",
    "stage3_param_persistence_threshold": "auto",
}

_CPU: dict[str, Any] = {"device": "cpu", "pin_memory": True}

DEEPSPEED: dict[str, dict[str, Any]] = {
    "zero0": _DEEPSPEED | {"zero_optimization": {"stage": 0}},
    "zero1": _DEEPSPEED | {"zero_optimization": {"stage": 1, "reduce_bucket_size": "auto"}},
    "zero2": _DEEPSPEED | {"zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}},
    "zero3": _DEEPSPEED | {"zero_optimization": _STAGE3},
    "zero3_offload": _DEEPSPEED | {"zero_optimization": _STAGE3 | {"offload_optimizer": _CPU, "offload_param": _CPU}},
}
"""DeepSpeed configurations. zero0: every process holds everything; zero1: the optimizer's state is divided among the
processes; zero2: gradients too; zero3: weights too; zero3_offload: all of these lie in the CPU's memory when they are
not in use. Weights stay float32; ``precision: bfloat16`` is autocast, as on one process."""

FSDP2_SINCE = (5, 23)
"""The version of transformers that trains what it has sharded itself."""


def check_engine(engine: str | None) -> None:
    """ConfigError if what the engine needs is not installed."""
    if engine is not None and engine.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        raise ConfigError(f"training.engine: {engine} needs DeepSpeed (docs/launch.md: Which engine); or use fsdp2")
    if engine == "fsdp2":
        found, needed = importlib.metadata.version("transformers"), ".".join(map(str, FSDP2_SINCE))
        if tuple(map(int, found.split(".")[:2])) < FSDP2_SINCE:
            raise ConfigError(f"training.engine: fsdp2 needs transformers {needed} or newer, and this is {found}")
