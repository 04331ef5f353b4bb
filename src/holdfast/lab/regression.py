"""Forgetting in one dimension: an ensemble of small networks learns one half of a line, then the other half."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from holdfast.config.section import Section

Network = list[tuple[Tensor, Tensor]]  # weight [particles, in, out] and bias [particles, 1, out] of each layer


class RegressionConfig(Section):
    """Data, networks and training; the shapes are the paper's."""

    old_points: int = Field(82, ge=2, description="points of the old task, x from -3.2 to -0.1")
    new_points: int = Field(44, ge=2, description="points of the new task, x from 0.3 to 3.2")
    old_noise: float = Field(0.02, gt=0, description="standard deviation of the noise on old y")
    new_noise: float = Field(0.045, gt=0, description="standard deviation of the noise on new y")
    hidden: list[int] = Field([48, 48, 24], min_length=1, description="widths of the hidden layers, tanh")
    particles: int = Field(8, ge=2, description="networks that stand for the posterior")
    old_steps: int = Field(2000, ge=1, description="steps of Adam on the old task")
    new_steps: int = Field(1500, ge=1, description="steps of Adam on the new task")
    learning_rate: float = Field(5e-3, gt=0, description="peak learning rate, cosine to 0")
    weights: list[float] = Field([0.0, 1.0], min_length=1, description="of the KL; 0 is plain fine-tuning")
    floor: float = Field(0.08, gt=0, description="added to the predictive standard deviation in the KL")


@dataclass(frozen=True)
class Points:
    """A task's points: x and y ``[points, 1]``, and the standard deviation of the noise on y."""

    x: Tensor
    y: Tensor
    noise: float


def old_task(x: Tensor) -> Tensor:
    """The function of the old task."""
    return 0.5 * torch.sin(1.9 * x) - 0.3 + 0.6 * torch.exp(-(((x + 1.1) / 0.25) ** 2))


def new_task(x: Tensor) -> Tensor:
    """The function of the new task: larger and faster."""
    return 1.2 * torch.sin(5.5 * x) + 0.7 * torch.cos(9.5 * x)


def experiment(config: RegressionConfig, seed: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Learn the old task, then the new one, once with each weight of the KL.

    The old posterior is an ensemble; each network has its own first weights and its own draw of the noise on y.
    Fine-tuning minimises, as with language models, L = L_new + weight * KL(old ‖ new): the first term the mean of
    ((y - f(x)) / noise)² / 2 over new points and networks, the second the mean over the old x of the KL between the
    Gaussians that the two ensembles predict there. Fine-tuning sees no old y.

    Returns:
        Rows of results, one a weight: root mean squared errors of the mean prediction on old and new points, before
        (``old_before``, ``new_before``) and after (``old_rmse``, ``new_rmse``), and ``old_rise``. Rows of curves: on a
        grid of x quartiles of the predictions (``low``, ``median``, ``high``) by ``phase``, ``old`` or the weight, and
        the points themselves, phases ``old points`` and ``new points``.
    """
    draw = torch.Generator().manual_seed(seed)
    old = _points(old_task, -3.2, -0.1, config.old_points, config.old_noise, draw)
    new = _points(new_task, 0.3, 3.2, config.new_points, config.new_noise, draw)
    start = _networks(config, draw)
    noisy = old.y + old.noise * torch.randn(config.particles, *old.y.shape, generator=draw)
    posterior = _train(start, config.old_steps, config.learning_rate, lambda net: _misfit(net, old.x, noisy, old.noise))
    remembered = _gaussian(posterior, old.x, config.floor)

    grid = torch.linspace(-3.4, 3.4, 341)[:, None]
    curves = [*_curve("old", posterior, grid), *_scatter("old points", old), *_scatter("new points", new)]
    before = {"old_before": _error(posterior, old), "new_before": _error(posterior, new)}
    results = []
    for weight in config.weights:

        def loss(net: Network, weight: float = weight) -> Tensor:
            misfit = _misfit(net, new.x, new.y, new.noise)
            return misfit + weight * gaussian_kl(*remembered, *_gaussian(net, old.x, config.floor)).mean()

        tuned = _train(posterior, config.new_steps, config.learning_rate, loss)
        errors = {"old_rmse": _error(tuned, old), "new_rmse": _error(tuned, new)}
        results.append({"weight": weight} | before | errors | {"old_rise": errors["old_rmse"] - before["old_before"]})
        curves += _curve(f"{weight:g}", tuned, grid)
    return results, curves


def gaussian_kl(mean: Tensor, std: Tensor, other_mean: Tensor, other_std: Tensor) -> Tensor:
    """KL(N(mean, std²) ‖ N(other_mean, other_std²)), elementwise, in nats."""
    return torch.log(other_std / std) + (std**2 + (mean - other_mean) ** 2) / (2 * other_std**2) - 0.5


def _points(function: Any, low: float, high: float, count: int, noise: float, draw: torch.Generator) -> Points:
    x = low + (high - low) * torch.rand(count, 1, generator=draw)
    return Points(x, function(x) + noise * torch.randn(count, 1, generator=draw), noise)


def _networks(config: RegressionConfig, draw: torch.Generator) -> Network:
    """New networks; the first layer's kinks are spread over the whole line, so that both halves can be fitted."""
    widths = [1, *config.hidden, 1]
    network = []
    for i, (fan_in, fan_out) in enumerate(itertools.pairwise(widths)):
        weight = torch.randn(config.particles, fan_in, fan_out, generator=draw) * (2.0 if i == 0 else fan_in**-0.5)
        bias = torch.zeros(config.particles, 1, fan_out)
        if i == 0:
            bias = -weight * (6.8 * torch.rand(weight.shape, generator=draw) - 3.4)
        network.append((weight, bias))
    return network


def _predict(network: Network, x: Tensor) -> Tensor:
    """Predictions ``[particles, points, 1]`` at x ``[points, 1]``."""
    h = x.expand(len(network[0][0]), *x.shape)
    for weight, bias in network[:-1]:
        h = torch.tanh(torch.baddbmm(bias, h, weight))
    return torch.baddbmm(network[-1][1], h, network[-1][0])


def _misfit(network: Network, x: Tensor, y: Tensor, noise: float) -> Tensor:
    return 0.5 * (((_predict(network, x) - y) / noise) ** 2).mean()


def _gaussian(network: Network, x: Tensor, floor: float) -> tuple[Tensor, Tensor]:
    predicted = _predict(network, x)
    return predicted.mean(0), predicted.std(0) + floor


def _error(network: Network, points: Points) -> float:
    return float(((_predict(network, points.x).mean(0) - points.y) ** 2).mean().sqrt())


def _train(network: Network, steps: int, learning_rate: float, loss: Any) -> Network:
    parts = [part.clone().requires_grad_() for layer in network for part in layer]
    trained = list(zip(parts[::2], parts[1::2], strict=True))
    optimizer = torch.optim.Adam(parts, lr=learning_rate, foreach=True)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = learning_rate * (1 + math.cos(math.pi * step / steps)) / 2
        optimizer.zero_grad()
        loss(trained).backward()
        optimizer.step()
    return [(weight.detach(), bias.detach()) for weight, bias in trained]


def _curve(phase: str, network: Network, grid: Tensor) -> Iterator[dict[str, Any]]:
    quartiles = torch.quantile(_predict(network, grid)[..., 0], torch.tensor([0.25, 0.5, 0.75]), dim=0)
    for x, (low, median, high) in zip(grid[:, 0].tolist(), quartiles.T.tolist(), strict=True):
        yield {"phase": phase, "x": x, "low": low, "median": median, "high": high}


def _scatter(phase: str, points: Points) -> Iterator[dict[str, Any]]:
    for x, y in zip(points.x[:, 0].tolist(), points.y[:, 0].tolist(), strict=True):
        yield {"phase": phase, "x": x, "median": y}
