"""This process among those that train together: its number, a barrier, a sum."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


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
