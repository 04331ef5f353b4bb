"""A loss on the logits of a large head, chunk by chunk: the logits of one chunk at most are held.

The gradient of each chunk is computed right after its loss, so the backward pass only scales it. Apart from the
gradients themselves, memory is a few times chunk_size * vocab instead of a few times tokens * vocab.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from holdfast.errors import ConfigError
from holdfast.losses.common import wide

CHUNK_SIZE = 512
_BLOCK = 8192  # rows of a head's gradient that are converted to float32 at a time

ChunkLoss = Callable[[Tensor, slice], tuple[Tensor, Tensor]]
"""(logits [chunk, vocab], the chunk's slice of the tokens) -> (the chunk's loss, its gradient [chunk, vocab])."""


class Head(NamedTuple):
    """The last linear layer: logits = cap(logit_scale * x), x = hidden @ weight.T + bias, cap(y) = c tanh(y / c).

    Attributes:
        weight: [vocab, hidden].
        bias: [vocab] or None.
        logit_scale: factor on the logits.
        softcap: c, the bound of the logits (final logit soft-capping of Gemma 2); None for no bound.
    """

    weight: Tensor
    bias: Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None

    def cast(self) -> Head:
        """The head in the data type of its matrix product: autocast's where that is on, else its own."""
        device = self.weight.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.weight.dtype
        return self._replace(weight=self.weight.to(dtype), bias=None if self.bias is None else self.bias.to(dtype))

    def detached(self) -> Head:
        """The same tensors without gradient."""
        return self._replace(weight=self.weight.detach(), bias=None if self.bias is None else self.bias.detach())

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [tokens, hidden] -> logits [tokens, vocab], float32 or wider; not for use under autograd."""
        return self.bounded(wide(F.linear(hidden.to(self.weight.dtype), self.weight, self.bias)))

    def bounded(self, logits: Tensor) -> Tensor:
        """x -> logits, in place: scale and bound what the matrix product gave."""
        if self.logit_scale != 1:
            logits.mul_(self.logit_scale)
        if self.softcap is not None:
            logits.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits

    def gradient(self, gradient: Tensor, logits: Tensor) -> Tensor:
        """d loss / d logits -> d loss / d x, both [tokens, vocab]; ``gradient`` is overwritten."""
        if self.softcap is not None:
            gradient.mul_((logits / self.softcap).square_().neg_().add_(1))
        if self.logit_scale != 1:
            gradient.mul_(self.logit_scale)
        return gradient


def chunked_loss(hidden: Tensor, head: Head, loss: ChunkLoss, chunk_size: int) -> Tensor:
    """Sum of ``loss`` over chunks of tokens: a scalar with gradient to hidden, head.weight and head.bias.

    Args:
        hidden: [tokens, hidden].
        head: the student's head, after :meth:`Head.cast`.
        loss: the loss of one chunk; it does not change the logits.
        chunk_size: tokens in a chunk.

    Raises:
        ConfigError: chunk_size is below 1.
    """
    _check_size(chunk_size)
    hidden = hidden.to(head.weight.dtype)
    return _ChunkedLoss.apply(hidden, head.weight, head.bias, head, loss, chunk_size, torch.is_grad_enabled())


def chunked_loss_of_logits(logits: Tensor, loss: ChunkLoss, chunk_size: int) -> Tensor:
    """:func:`chunked_loss` of logits [tokens, vocab] that have been computed already: a scalar with gradient to them.

    That gradient is the only further tensor of their size.

    Raises:
        ConfigError: chunk_size is below 1.
    """
    _check_size(chunk_size)
    return _LossOfLogits.apply(logits, loss, chunk_size)


def _check_size(chunk_size: int) -> None:
    if chunk_size < 1:
        raise ConfigError(f"chunk_size: {chunk_size} is no number of tokens; at least 1 is needed")


class _LossOfLogits(torch.autograd.Function):
    """(logits, loss of a chunk, chunk_size) -> the sum of the chunks' losses."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, loss: ChunkLoss, chunk_size: int) -> Tensor:
        total = wide(logits.new_zeros(()))
        gradient = torch.empty_like(logits)
        for start in range(0, len(logits), chunk_size):
            chunk = slice(start, start + chunk_size)
            value, gradient[chunk] = loss(wide(logits[chunk]), chunk)
            total += value
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor | None, ...]:
        return _scaled(ctx.saved_tensors[0], factor), None, None


class _ChunkedLoss(torch.autograd.Function):
    """(hidden, weight, bias, head, loss of a chunk, chunk_size, with_gradient) -> the sum of the chunks' losses."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        head: Head,
        loss: ChunkLoss,
        chunk_size: int,
        with_gradient: bool,
    ) -> Tensor:
        wanted = [with_gradient and needed for needed in ctx.needs_input_grad[:3]]
        total = wide(hidden.new_zeros(()))
        grad_hidden = torch.empty_like(hidden) if wanted[0] else None
        grad_weight = torch.zeros_like(weight, dtype=total.dtype) if wanted[1] else None
        grad_bias = torch.zeros_like(bias, dtype=total.dtype) if bias is not None and wanted[2] else None
        for start in range(0, len(hidden), chunk_size):
            chunk = slice(start, start + chunk_size)
            logits = head.logits(hidden[chunk])
            value, gradient = loss(logits, chunk)
            total += value
            if not any(wanted):
                continue
            gradient = head.gradient(gradient, logits)
            del logits
            if grad_bias is not None:
                grad_bias += gradient.sum(0)
            gradient = gradient.to(weight.dtype)
            if grad_hidden is not None:
                grad_hidden[chunk] = gradient @ weight
            if grad_weight is not None:
                for rows, columns in zip(grad_weight.split(_BLOCK), gradient.split(_BLOCK, dim=1), strict=True):
                    rows.add_(columns.T @ hidden[chunk])
        ctx.save_for_backward(
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(weight.dtype),
        )
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor | None, ...]:
        return *(None if gradient is None else _scaled(gradient, factor) for gradient in ctx.saved_tensors), *[None] * 4


def _scaled(gradient: Tensor, factor: Tensor) -> Tensor:
    """gradient * factor as a new tensor; the product is computed in float32 or wider."""
    result = torch.empty_like(gradient)
    for source, target in zip(gradient.split(_BLOCK), result.split(_BLOCK), strict=True):
        target.copy_(wide(source) * factor)
    return result
