"""FSDP2: parameters that torch's ``fully_shard`` divides among processes, along their first dimension."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from holdfast.engines.layout import ENTRYWISE, Layout
from holdfast.engines.process import Process
from holdfast.engines.profile import Profile
from holdfast.errors import ConfigError

SINCE = (5, 23)
"""The version of transformers that trains what it has sharded itself."""


class Sharded:
    """This process's shard of a parameter."""

    def __init__(self, parameter: DTensor):
        self.shape = parameter.shape
        self._stride = parameter.stride()
        self._mesh, self._placements = parameter.device_mesh, parameter.placements

    def distribute(self, whole: Tensor) -> DTensor:
        """A tensor that is sharded as the parameter is, such as a moment of its optimizer."""
        return distribute_tensor(whole.to(self._mesh.device_type), self._mesh, self._placements, src_data_rank=None)

    def take(self, whole: Tensor) -> Tensor:
        return self.distribute(whole).to_local()

    def join(self, piece: Tensor) -> Tensor:
        if piece.dim() > len(self.shape):
            return torch.stack([self.join(row) for row in piece])
        local = piece.to(self._mesh.device_type)
        joined = DTensor.from_local(
            local, self._mesh, self._placements, run_check=False, shape=self.shape, stride=self._stride
        )
        return joined.full_tensor()


class Fsdp2(Layout):
    """A parameter is a DTensor. A tuner's own parameters, which each process holds whole, are not."""

    divided = True
    averages_all = False
    optimizers = ("adagrad", *ENTRYWISE)

    def has(self, p: Tensor) -> bool:
        return isinstance(p, DTensor)

    def piece(self, p: Any) -> Sharded:
        return Sharded(p)

    def weight(self, p: Any) -> Tensor:
        return p.data.to_local()

    def gradient(self, p: Any) -> Tensor:
        gradient: Any = super().gradient(p)
        return gradient.to_local()

    def full(self, p: Any) -> Tensor:
        return p.full_tensor()

    def gradient_of_sum(
        self, losses: Iterable[Tensor], parameters: Mapping[str, nn.Parameter], over_processes: bool
    ) -> dict[str, Tensor]:
        """By backward passes of the engine's own: they shard gradients as they come, and take the processes' mean."""
        accumulated = {name: p.grad for name, p in parameters.items()}
        for p in parameters.values():
            p.grad = None
        try:
            for loss in losses:
                loss.backward()
            layouts = {name: self if self.has(p) else Layout() for name, p in parameters.items()}
            found = {name: layouts[name].gradient(p).float() for name, p in parameters.items()}
        finally:
            for name, p in parameters.items():
                p.grad = accumulated[name]
        if over_processes:
            process = Process.this()
            for name, layout in layouts.items():
                if layout is self:
                    found[name].mul_(process.world)
            process.all_reduce_sum_([found[name] for name, layout in layouts.items() if layout is not self])
        return found

    def reshard(self, model: nn.Module) -> None:
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def gather_own(self, model: nn.Module) -> None:
        root = next((module for module in model.modules() if isinstance(module, FSDPModule)), None)
        if root is not None:
            root.unshard()

    def prepare_loaded(self, model: nn.Module) -> None:
        """Make the model itself FSDP2's root, the module that is called first; a tuner may look into its embeddings."""
        with torch.no_grad():
            model(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=next(model.parameters()).device))
        self.reshard(model)
        _join_tied(model)

    def entry(self, value: Any) -> Tensor:
        return value.to_local() if isinstance(value, DTensor) else value

    def state_to_save(self, p: Any, value: Tensor) -> Tensor:
        return value.full_tensor() if isinstance(value, DTensor) else value

    def state_to_load(self, p: Any, whole: Tensor) -> Tensor:
        return Sharded(p).distribute(whole) if whole.shape == p.shape else whole.clone()


def _join_tied(model: nn.Module) -> None:
    """Let all of FSDP2's units gather the same memory of a weight that several of them have, such as a tied embedding.

    A unit pads a weight that cannot be divided evenly, and so copies it; but the optimizer steps the last copy alone.
    """
    units = [module._get_fsdp_state()._fsdp_param_group for module in model.modules() if isinstance(module, FSDPModule)]
    for held in (held for unit in units if unit is not None for held in unit.fsdp_params):
        tied: Any = held.sharded_param
        local, padded = tied.to_local(), held._sharded_param_data
        if local.untyped_storage().data_ptr() != padded.untyped_storage().data_ptr():
            held._sharded_param_data = local.new_empty(0).set_(
                local.untyped_storage(), local.storage_offset(), padded.shape
            )


class Fsdp2Profile(Profile):
    """``training.engine: fsdp2``."""

    def check(self, optimizer: str) -> None:
        """A tuner's own weights, which are not divided, take any optimizer."""
        super().check(optimizer)
        version, needed = importlib.metadata.version("transformers"), ".".join(map(str, SINCE))
        if tuple(map(int, version.split(".")[:2])) < SINCE:
            raise ConfigError(f"training.engine: fsdp2 needs transformers {needed} or newer, and this is {version}")

    def loading_options(self) -> dict[str, Any]:
        """Each process reads its share of the weights alone."""
        world = Process.this().world
        if world == 1:
            return {}
        from transformers.distributed import DistributedConfig

        return {"distributed_config": DistributedConfig(fsdp_size=world)}
