"""This process among those that train together: its number, a barrier, sums, and what others know."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from holdfast.shards import Shards


@dataclass(frozen=True)
class Process:
    """Attributes: its number, from 0, and how many there are."""

    rank: int
    world: int

    @classmethod
    def this(cls) -> Process:
        """The process that this code runs in, as a launcher (torchrun, accelerate, deepspeed) has set it up."""
        from accelerate import PartialState

        state = PartialState(cpu=not torch.cuda.is_available())
        return cls(state.process_index, state.num_processes)

    @property
    def main(self) -> bool:
        """Whether it is the one that writes files."""
        return self.rank == 0

    def wait(self) -> None:
        """Return once every process is here."""
        if self.world > 1:
            torch.distributed.barrier()

    def sum(self, values: Tensor) -> Tensor:
        """The sum of a tensor over all processes, on the CPU."""
        if self.world > 1:
            values = values.to("cuda" if torch.distributed.get_backend() == "nccl" else "cpu")
            torch.distributed.all_reduce(values)
        return values.cpu()

    def sum_all(self, vector: Shards) -> Shards:
        """The sum over all processes of a vector that none of them holds in pieces, in place, by one all-reduce."""
        if self.world > 1 and vector.tensors:
            flat = torch.cat([t.flatten() for t in vector])
            torch.distributed.all_reduce(flat)
            for t, part in zip(vector, flat.split([t.numel() for t in vector]), strict=True):
                t.copy_(part.view_as(t))
        return vector

    def all(self, value: Any) -> list[Any]:
        """The values of all processes, in their order."""
        values = [value] * self.world
        if self.world > 1:
            torch.distributed.all_gather_object(values, value)
        return values

    def first(self, value: Any) -> Any:
        """The main process's value."""
        values = [value]
        if self.world > 1:
            torch.distributed.broadcast_object_list(values)
        return values[0]

    def any(self, value: bool) -> bool:
        """Whether it is true in any process."""
        return bool(self.sum(torch.tensor(float(value)))) if self.world > 1 else value
