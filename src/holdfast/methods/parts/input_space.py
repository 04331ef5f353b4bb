"""The inputs of adapted layers: their covariance over rows, and a growing space that holds most of them (DualGPM)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from holdfast.api.method import State
from holdfast.api.rows import TokenRow
from holdfast.api.stage import Stage
from holdfast.engines.pieces import reshard
from holdfast.engines.process import Process
from holdfast.engines.saved import saved_tensor
from holdfast.errors import ConfigError
from holdfast.losses.common import wide
from holdfast.models.head import hidden_only
from holdfast.system.device import to_float64

ROUNDING = 1e-9
"""A share of the inputs' squared norm that counts as nothing: what rounding leaves where inputs fill no whole space."""


@dataclass(frozen=True)
class InputSpace:
    """The span of what a layer has received in past tasks, by an orthonormal basis of it or of its complement.

    The narrower of both is stored, as in DualGPM (Liang and Li, CVPR 2023, "Adaptive Plasticity Improvement for
    Continual Learning"), so that no more than half a square matrix is.

    Attributes:
        basis: [in, directions], float32.
        is_free: whether it is the basis of the complement.
    """

    basis: Tensor
    is_free: bool

    @classmethod
    def empty(cls, width: int) -> InputSpace:
        """That of a layer with ``width`` inputs, which has received nothing."""
        return cls(torch.zeros(width, 0), False)

    @property
    def free_directions(self) -> int:
        """The dimension of the complement."""
        width, stored = self.basis.shape
        return stored if self.is_free else width - stored

    def free(self, device: torch.device) -> Tensor:
        """An orthonormal basis of the complement, float64 [in, free directions]."""
        basis = to_float64(self.basis.to(device))
        if self.is_free:
            return basis
        return torch.linalg.qr(basis, mode="complete").Q[:, basis.shape[1] :]

    def without(self, change: Tensor) -> Tensor:
        """A change of weights [out, in] without what acts on inputs in the span."""
        basis = self.basis.to(change)
        inside = (change @ basis) @ basis.T
        return inside if self.is_free else change - inside

    def strongest_free(self, covariance: Tensor, count: int) -> Tensor:
        """The directions of the complement along which inputs are largest, orthonormal rows, the largest first.

        Args:
            covariance: mean of x x^T over inputs x, float64 [in, in].

        Returns:
            [count, in], of the covariance's data type; rows for which there is no direction are zero.
        """
        _, directions = self._sorted_free(covariance)
        rows = directions[:, :count].T
        return nn.functional.pad(rows, (0, 0, 0, count - len(rows)))

    def grown(self, covariance: Tensor, share: float) -> InputSpace:
        """The span with as few directions more as let it hold ``share`` of the inputs' squared norm (GPM, equation 9).

        Args:
            covariance: mean of x x^T over inputs x, float64 [in, in].

        Returns:
            a space whose basis lies on the CPU, wherever this one's and the covariance do.
        """
        energies, directions = self._sorted_free(covariance)
        total = covariance.trace()
        held = total - energies.sum() + torch.cat([energies.new_zeros(1), energies.cumsum(0)])  # by 0, 1, ... more
        count = min(int((held < share * total * (1 - ROUNDING)).sum()), len(energies))
        spanned = self.basis.shape[0] - self.free_directions + count
        if self.is_free or spanned > self.basis.shape[0] / 2:
            return InputSpace(directions[:, count:].float().cpu(), True)
        return InputSpace(torch.cat([self.basis.cpu(), directions[:, :count].float().cpu()], dim=1), False)

    def _sorted_free(self, covariance: Tensor) -> tuple[Tensor, Tensor]:
        """Mean squared inputs along orthogonal directions of the complement, descending, [free], and these [in, free].

        The sign of a direction is the one with which its largest entry is positive.
        """
        free = self.free(covariance.device)
        energies, vectors = torch.linalg.eigh(free.T @ covariance @ free)
        directions = free @ vectors.flip(1)
        if directions.numel():
            directions = directions * directions.gather(0, directions.abs().argmax(dim=0, keepdim=True)).sign()
        return energies.flip(0).clamp(min=0), directions


def spaces_state(spaces: Mapping[str, InputSpace]) -> State:
    """What :func:`spaces_from_state` reads back."""
    return {f"{'free' if space.is_free else 'spanned'}/{layer}": space.basis for layer, space in spaces.items()}


def spaces_from_state(state: State, widths: Mapping[str, int]) -> dict[str, InputSpace]:
    """The spaces of layers by name, of so many inputs each.

    Raises:
        ValueError: one is missing, or of another shape.
    """
    spaces = {}
    for layer, width in widths.items():
        is_free = f"free/{layer}" in state
        basis = saved_tensor(state, f"{'free' if is_free else 'spanned'}/{layer}", width, None)
        spaces[layer] = InputSpace(basis, is_free)
    return spaces


def input_covariances(
    stage: Stage, layers: Mapping[str, nn.Module], rows: Sequence[TokenRow], method: str
) -> dict[str, Tensor]:
    """The mean of x x^T over all tokens of the rows, of each layer's input x, under the current weights.

    Each process goes through its share of the rows.

    Returns:
        by the layer's name, float64 [in, in], on the model's device.

    Raises:
        ConfigError: a layer does not receive every token.
    """
    process, size, model = Process.this(), stage.micro_batch_size, stage.model
    share = rows[process.rank :: process.world]
    sums: dict[str, Tensor] = {}
    counted = torch.zeros(())  # 1 for each token of a pass that counts

    def watch(name: str) -> Callable[[nn.Module, Any], None]:
        def add(layer: nn.Module, args: Any) -> None:
            x = args[0].detach()
            if math.prod(x.shape[:-1]) != counted.numel():
                raise ConfigError(
                    f"method {method}: {name} does not receive every token, as an expert of a mixture; leave it out of "
                    "the tuner's target_modules"
                )
            x = wide(x.reshape(-1, x.shape[-1])[counted.bool().flatten()])
            with torch.autocast(x.device.type, enabled=False):
                sums[name] = sums[name].addmm_(x.T, x) if name in sums else x.T @ x

        return add

    training, tokens = model.training, 0
    model.eval()
    with torch.no_grad(), ExitStack() as hooks:
        for name, layer in layers.items():
            hooks.callback(layer.register_forward_pre_hook(watch(name)).remove)
        for start in range(0, math.ceil(len(rows) / process.world), size):
            stage.check_stop()
            # A process without rows goes along, since the others may need its part of the weights.
            batch = stage.collate(share[start : start + size] or rows[:1])
            batch.pop("labels")
            counted = batch["attention_mask"] * (start < len(share))
            tokens += int(counted.sum())
            model(**batch, use_cache=False, **hidden_only(model))
    model.train(training)
    reshard(model)
    total = sum(process.gather(tokens))
    device = next(iter(sums.values())).device
    return {name: to_float64(process.all_reduce_sum(sums[name]).to(device)) / total for name in layers}
