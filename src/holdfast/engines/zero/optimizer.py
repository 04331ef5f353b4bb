"""The state of DeepSpeed's flattened optimizers, by parameter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from holdfast.engines.zero.parts import is_partitioned, optimizer_of, part


class Unflattened:
    """An engine's torch optimizer, which steps flat tensors, as if it held the model's parameters.

    Attributes:
        param_groups: as a torch optimizer's.
        state: by parameter and kind, live: this process's part [length], or a scalar [].
    """

    def __init__(self, optimizer: Any):
        self._optimizer, self._inner = optimizer, optimizer.optimizer
        if hasattr(optimizer, "fp16_groups"):
            groups: list[list[Any]] = [[] for _ in self._inner.param_groups]
            for number, parameters in enumerate(optimizer.fp16_groups):
                groups[optimizer.sub_group_to_group_id[number]] += parameters
        else:
            groups = optimizer.bit16_groups
        self.param_groups = [
            group | {"params": parameters} for group, parameters in zip(self._inner.param_groups, groups, strict=True)
        ]
        self.state = {p: self._parts(p) for parameters in groups for p in parameters}

    def _parts(self, p: Any) -> dict[str, Any]:
        flat, start = self._place(p)
        return {
            kind: t.narrow(0, start, part(p).length) if isinstance(t, Tensor) and t.shape == flat.shape else t
            for kind, t in self._inner.state[flat].items()
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Put back a state of the form of a torch optimizer's state_dict, whose tensors are this process's parts."""
        parameters = [p for group in self.param_groups for p in group["params"]]
        for group, known in zip(self._inner.param_groups, saved["param_groups"], strict=True):
            group.update({key: value for key, value in known.items() if key != "params"})
        for number, state in saved["state"].items():
            flat, start = self._place(parameters[number])
            kept = self._inner.state[flat]
            for kind, value in state.items():
                if isinstance(value, Tensor) and value.dim():
                    if kind not in kept:
                        kept[kind] = torch.zeros_like(flat, dtype=value.dtype, requires_grad=False)
                    kept[kind].narrow(0, start, len(value)).copy_(value)
                else:
                    kept[kind] = value

    def _place(self, p: Any) -> tuple[Tensor, int]:
        """The flat tensor that is stepped for a parameter, and where this process's part of it begins there."""
        optimizer = self._optimizer
        if is_partitioned(p):
            group, start, _ = optimizer.grad_position[optimizer.get_param_id(p)]
            return optimizer.fp32_partitioned_groups_flat[group], start
        group = next(
            i for i, parameters in enumerate(optimizer.bit16_groups) if any(other is p for other in parameters)
        )
        flat = optimizer.single_partition_of_fp32_groups[group]
        return flat, p._hp_mapping.hp_fragment_address.start if p._hp_mapping else 0


def unflattened(model: nn.Module) -> Unflattened | None:
    """The optimizer of a model's engine, where that steps flat tensors."""
    optimizer = optimizer_of(model)
    return Unflattened(optimizer) if hasattr(optimizer, "optimizer") else None
