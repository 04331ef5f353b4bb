"""What ``training.engine`` adds to how a model is loaded, and to transformers' TrainingArguments."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from holdfast.process import Process
from holdfast.shards import at_rest, is_divided

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


def loading(engine: str | None) -> dict[str, Any]:
    """Options of from_pretrained: where FSDP2 divides the weights, each process reads its share of them alone."""
    world = Process.this().world
    if engine != "fsdp2" or world == 1:
        return {}
    from transformers.distributed import DistributedConfig

    return {"distributed_config": DistributedConfig(fsdp_size=world)}


def loaded(model: nn.Module) -> None:
    """Make the model itself FSDP2's root, the module that is called first; a tuner may look into its embeddings."""
    if is_divided(model):
        with torch.no_grad():
            model(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=next(model.parameters()).device))
        at_rest(model)
        _join_tied(model)


def _join_tied(model: nn.Module) -> None:
    """Let all of FSDP2's units gather the same memory of a weight that several of them have, such as a tied embedding.

    Where it cannot be divided evenly each unit pads it, and so copies it; but the optimizer steps the last copy alone.
    """
    units = [module._get_fsdp_state()._fsdp_param_group for module in model.modules() if isinstance(module, FSDPModule)]
    for held in (held for unit in units if unit is not None for held in unit.fsdp_params):
        tied: Any = held.sharded_param
        local, padded = tied.to_local(), held._sharded_param_data
        if local.untyped_storage().data_ptr() != padded.untyped_storage().data_ptr():
            held._sharded_param_data = local.new_empty(0).set_(
                local.untyped_storage(), local.storage_offset(), padded.shape
            )
