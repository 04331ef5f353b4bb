"""DeepSpeed's configurations, and what a run with one of them asks of transformers."""

from __future__ import annotations

import importlib.util
import logging
import os
from typing import Any

from holdfast.engines.layout import Layout
from holdfast.engines.profile import Profile
from holdfast.engines.zero.layout import Flattened
from holdfast.errors import ConfigError
from holdfast.system.device import on_gpu
from holdfast.system.machine import free_port

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


class ZeroProfile(Profile):
    """``training.engine: zero0`` to ``zero3_offload``."""

    used = False
    """Whether one of them has begun to train in this process."""

    def __init__(self, name: str):
        self.name = name

    def check(self, optimizer: str) -> None:
        layout = Layout() if self.name == "zero0" else Flattened()
        layout.check_optimizer(optimizer)
        if importlib.util.find_spec("deepspeed") is None:
            raise ConfigError(
                f"training.engine: {self.name} needs DeepSpeed (docs/launch.md: Which engine); or use fsdp2"
            )

    def arguments(self) -> dict[str, Any]:
        begin()
        ZeroProfile.used = True
        values = {
            "deepspeed": DEEPSPEED[self.name],
            "use_cpu": False,
            "accelerator_config": {"use_configured_state": True},
        }
        # TrainingArguments would not believe that a CPU can compute in bfloat16.
        return values if on_gpu() else values | {"bf16": False}

    def complete(self, arguments: Any, bfloat16: bool) -> None:
        """Let ``bf16`` mean autocast on float32 weights, as on one process; see :func:`~.engine.autocast`.

        accelerate would turn it into bfloat16 weights where the DeepSpeed configuration does not name it.
        """
        arguments.hf_deepspeed_config.config.setdefault("bf16", {"enabled": False})
        arguments.bf16 = bfloat16


def begin() -> None:
    """Let accelerate's state say DeepSpeed, on a CPU too, before TrainingArguments that use the configured state.

    A process that no launcher has started is the only one. DeepSpeed's own collectives for a CPU, which it would
    compile, are not used.
    """
    from accelerate.state import AcceleratorState, PartialState

    if "RANK" not in os.environ:
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        os.environ.setdefault("MASTER_PORT", str(free_port()))
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    for logger in ("DeepSpeed", "accelerate.accelerator"):
        logging.getLogger(logger).addFilter(_is_news)
    AcceleratorState._reset_state(reset_partial_state=True)
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    try:
        PartialState(backend=None if on_gpu() else "gloo")
    finally:
        del os.environ["ACCELERATE_USE_DEEPSPEED"]


def forget() -> None:
    """Let the next model be loaded whole, and trained without DeepSpeed unless its engine asks for it.

    After ZeRO-3 transformers would divide a model that it loads, without an engine to join it; and accelerate leaves
    word in the environment, for which every later trainer of this process would be one of DeepSpeed's.
    """
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()
    if ZeroProfile.used:
        os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)


def _is_news(record: logging.LogRecord) -> bool:
    """Whether a warning says more than that the run's own optimizer and accumulation are used, as they should be."""
    return not any(text in record.getMessage() for text in ("untested optimizer", "accumulation steps mismatch"))
