"""The state of DeepSpeed's flattened optimizers, by parameter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


class Unflattened:
    """An engine's torch optimizer, which steps flat tensors, as if it held the model's parameters.

    Args:
        optimizer: the torch optimizer.
        groups: the model's parameters in each of its groups.
        places: of each parameter the flat tensor that is stepped for it, and where in it this process's part begins
            and how long it is.

    Attributes:
        param_groups: as a torch optimizer's.
        state: by parameter and kind, live: this process's part [length], or a scalar [], which all parameters of a flat
            tensor share.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        groups: Sequence[list[Any]],
        places: Mapping[Any, tuple[Tensor, int, int]],
    ):
        self._optimizer, self._places = optimizer, places
        self.param_groups = [
            group | {"params": parameters} for group, parameters in zip(optimizer.param_groups, groups, strict=True)
        ]
        self.state = {p: self._parts(p) for parameters in groups for p in parameters}

    def _parts(self, p: Any) -> dict[str, Any]:
        flat, start, length = self._places[p]
        return {
            kind: t.narrow(0, start, length) if isinstance(t, Tensor) and t.shape == flat.shape else t
            for kind, t in self._optimizer.state[flat].items()
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Put back a state of the form of a torch optimizer's state_dict, whose tensors are this process's parts."""
        parameters = [p for group in self.param_groups for p in group["params"]]
        on_device = set()
        for group, settings in zip(self._optimizer.param_groups, saved["param_groups"], strict=True):
            group.update({key: value for key, value in settings.items() if key != "params"})
            if group.get("fused") or group.get("capturable"):
                on_device.update(settings["params"])
        for number, entries in saved["state"].items():
            flat, start, length = self._places[parameters[number]]
            state = self._optimizer.state[flat]
            for kind, value in entries.items():
                if isinstance(value, Tensor) and value.dim():
                    if kind not in state:
                        state[kind] = torch.zeros_like(flat, dtype=value.dtype, requires_grad=False)
                    state[kind].narrow(0, start, length).copy_(value)
                else:
                    state[kind] = value.to(flat.device) if isinstance(value, Tensor) and number in on_device else value
