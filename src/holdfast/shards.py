"""Vector algebra over the trainable parameters and their gradients."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn


class Shards:
    """A vector with one tensor a trainable parameter, in the model's order.

    It may be a live view on the weights or gradients (then in-place operations change them) or a copy.
    """

    def __init__(self, tensors: dict[str, Tensor]):
        self.tensors = tensors

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.tensors.values())

    def copy(self) -> Shards:
        """A float32 copy that shares no memory."""
        return Shards({name: t.detach().to(torch.float32, copy=True) for name, t in self.tensors.items()})

    def zeros_like(self) -> Shards:
        """A float32 vector of zeros of the same shape."""
        return Shards({name: torch.zeros_like(t, dtype=torch.float32) for name, t in self.tensors.items()})

    def dot(self, other: Shards) -> float:
        """Inner product <self, other>: float32 products, summed over tensors in float64."""
        return sum(
            float(torch.dot(t.detach().flatten().float(), other.tensors[name].detach().flatten().float()))
            for name, t in self.tensors.items()
        )

    @torch.no_grad()
    def add_(self, other: Shards, scale: float = 1.0) -> Shards:
        """self += scale * other, in place."""
        for name, t in self.tensors.items():
            t.add_(other.tensors[name].to(t.dtype), alpha=scale)
        return self

    @torch.no_grad()
    def scale_(self, factor: float) -> Shards:
        """self *= factor, in place."""
        for t in self:
            t.mul_(factor)
        return self

    def state(self, prefix: str) -> dict[str, Tensor]:
        """The tensors under ``prefix/name``, for a method's saved state."""
        return {f"{prefix}/{name}": t for name, t in self.tensors.items()}

    @classmethod
    def from_state(cls, state: dict[str, Tensor], prefix: str, like: Shards) -> Shards:
        """Read back what :meth:`state` gave, on the devices of ``like``."""
        return cls({name: state[f"{prefix}/{name}"].to(t.device) for name, t in like.tensors.items()})


def weights(model: nn.Module) -> Shards:
    """A live view on the trainable parameters."""
    return Shards({name: p.data for name, p in model.named_parameters() if p.requires_grad})


def gradients(model: nn.Module) -> Shards:
    """A live view on the accumulated gradients; a parameter that got none gets a zero gradient."""
    tensors = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
            tensors[name] = p.grad
    return Shards(tensors)


def gradient_of(loss: Tensor, model: nn.Module) -> Shards:
    """The gradient of a scalar at the current weights, float32; accumulated gradients stay as they are."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, [p for _, p in named], allow_unused=True)
    return Shards(
        {
            name: torch.zeros_like(p, dtype=torch.float32) if g is None else g.float()
            for (name, p), g in zip(named, found, strict=True)
        }
    )


def fingerprint(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 (hexadecimal) over the names, types, shapes and bytes of tensors, in order."""
    digest = hashlib.sha256()
    for name, t in tensors:
        digest.update(f"{name} {t.dtype} {list(t.shape)}\n".encode())
        digest.update(t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
