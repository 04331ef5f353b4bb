"""What ``training.engine`` adds to how a model is loaded, and to transformers' TrainingArguments."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from holdfast.engines.pieces import is_divided, reshard
from holdfast.engines.process import Process


def sharded_loading_options(engine: str | None) -> dict[str, Any]:
    """Options of from_pretrained: where FSDP2 divides the weights, each process reads its share of them alone."""
    world = Process.this().world
    if engine != "fsdp2" or world == 1:
        return {}
    from transformers.distributed import DistributedConfig

    return {"distributed_config": DistributedConfig(fsdp_size=world)}


def prepare_loaded(model: nn.Module) -> None:
    """Make the model itself FSDP2's root, the module that is called first; a tuner may look into its embeddings."""
    if is_divided(model):
        with torch.no_grad():
            model(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=next(model.parameters()).device))
        reshard(model)
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
