"""Rank, world size and collectives of this process."""

from __future__ import annotations

import os
import sys
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from holdfast.system.device import device_type, on_gpu

if TYPE_CHECKING:
    from torch import Tensor

LAUNCHED = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""What launchers say the number of processes in."""


@dataclass(frozen=True)
class Process:
    """One of the processes that train together.

    Attributes:
        rank: its number, from 0.
        world: how many processes there are.
    """

    rank: int
    world: int

    @classmethod
    def this(cls) -> Process:
        """The process that this code runs in, as a launcher (torchrun, accelerate, deepspeed, mpirun) has set it up.

        Where none has and torch is not imported yet, it is the only one, and torch is not imported for that.
        """
        if "torch" not in sys.modules and not any(key in os.environ for key in LAUNCHED):
            return cls(0, 1)
        from accelerate import PartialState

        state = PartialState(cpu=not on_gpu())
        return cls(state.process_index, state.num_processes)

    @property
    def main(self) -> bool:
        """Whether this process is rank 0, the one that writes files."""
        return self.rank == 0

    def wait(self) -> None:
        """Wait until every process is here (a barrier)."""
        if self.world > 1:
            import torch

            torch.distributed.barrier()

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        """Sum a tensor over all processes; the result lies on the CPU."""
        if self.world > 1:
            import torch

            values = values.to("cpu" if torch.distributed.get_backend() == "gloo" else device_type())
            torch.distributed.all_reduce(values)
        return values.cpu()

    def all_reduce_sum_(self, tensors: Collection[Tensor]) -> None:
        """Sum each of several tensors over all processes, in place, by one all-reduce."""
        if self.world > 1 and tensors:
            import torch

            flat = torch.cat([t.flatten() for t in tensors])
            torch.distributed.all_reduce(flat)
            for t, summed in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
                t.copy_(summed.view_as(t))

    def gather(self, value: Any) -> list[Any]:
        """Collect one value from every process, in the order of ranks."""
        values = [value] * self.world
        if self.world > 1:
            import torch

            torch.distributed.all_gather_object(values, value)
        return values

    def broadcast(self, value: Any) -> Any:
        """Send rank 0's value to every process."""
        values = [value]
        if self.world > 1:
            import torch

            torch.distributed.broadcast_object_list(values)
        return values[0]

    def any_of(self, value: bool) -> bool:
        """Whether `value` is true on at least one rank."""
        if self.world == 1:
            return value
        import torch

        return bool(self.all_reduce_sum(torch.tensor(float(value))))
