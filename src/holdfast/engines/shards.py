"""Vector algebra over the trainable parameters and their gradients, however an engine has laid them out.

Nothing here gathers a whole vector but :meth:`Shards.state`, one tensor at a time, for saving.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from holdfast.engines.layout import Piece
from holdfast.engines.process import Process
from holdfast.engines.saved import saved_tensor
from holdfast.system.device import to_float64

CHUNK = 1 << 18
"""Columns of a stack that are held in float64 at a time."""


class Shards:
    """A vector with one tensor a trainable parameter, in the model's order.

    It may be a live view on the weights or gradients (then in-place operations change them) or a copy. A stack of
    vectors is the same with one dimension more in front: tensors [count, ...].

    Args:
        tensors: what this process holds: whole tensors, or its pieces of those that an engine has divided among the
            processes. Every process calls the same operations in the same order; sums go over all pieces, by one small
            all-reduce an operation.
        pieces: how the divided ones are divided, by name.
        written: called after every change in place, for a view that an engine keeps copies of.
    """

    def __init__(
        self,
        tensors: dict[str, Tensor],
        pieces: Mapping[str, Piece] | None = None,
        written: Callable[[], None] | None = None,
    ):
        self.tensors = tensors
        self.pieces = pieces or {}
        self._written = written

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.tensors.values())

    def copy(self) -> Shards:
        """A float32 copy that shares no memory."""
        return self.like({name: t.detach().to(torch.float32, copy=True) for name, t in self.tensors.items()})

    def zeros_like(self) -> Shards:
        """A float32 vector of zeros of the same shape."""
        return self.like({name: torch.zeros_like(t, dtype=torch.float32) for name, t in self.tensors.items()})

    def like(self, tensors: dict[str, Tensor]) -> Shards:
        """Another vector, or stack, that is divided as this one is."""
        return Shards(tensors, self.pieces)

    def dot(self, other: Shards) -> float:
        """Inner product <self, other>: float32 products, summed over tensors in float64."""
        return float(self._total(self._products(other, torch.dot, 1)))

    def l1(self) -> Tensor:
        """L1 norm of each tensor, [tensors], float64 on the CPU: sums in float32."""
        sums = torch.stack([t.detach().float().abs().sum() for t in self]).cpu().double()
        divided = torch.tensor([name in self.pieces for name in self.tensors])
        return torch.where(divided, Process.this().all_reduce_sum(sums), sums) if self.pieces else sums

    @torch.no_grad()
    def add_(self, other: Shards, scale: float = 1.0) -> Shards:
        """self += scale * other, in place."""
        for name, t in self.tensors.items():
            t.add_(other.tensors[name].to(t.dtype), alpha=scale)
        return self._changed()

    @torch.no_grad()
    def all_reduce_(self) -> Shards:
        """Sum over all processes, in place, by one all-reduce; no tensor may be divided among processes."""
        Process.this().all_reduce_sum_(self.tensors.values())
        return self

    @torch.no_grad()
    def copy_(self, other: Shards) -> Shards:
        """self = other, in place, from any device and data type."""
        for name, t in self.tensors.items():
            t.copy_(other.tensors[name])
        return self._changed()

    @torch.no_grad()
    def scale_(self, factor: float) -> Shards:
        """self *= factor, in place."""
        for t in self:
            t.mul_(factor)
        return self._changed()

    @classmethod
    def stack(cls, vectors: Sequence[Shards]) -> Shards:
        """A stack of copies of ``vectors``, float32, in their order."""
        first = vectors[0]
        return first.like(
            {name: torch.stack([v.tensors[name].detach().float() for v in vectors]) for name in first.tensors}
        )

    def joined(self, other: Shards) -> Shards:
        """The vectors of this stack and those of another, in one stack."""
        return self.like({name: torch.cat([t, other.tensors[name]]) for name, t in self.tensors.items()})

    def products(self, vector: Shards) -> Tensor:
        """Inner product of each vector of this stack with ``vector``, [count], float64 on the CPU: as :meth:`dot`."""
        return self._total(self._products(vector, torch.mv, 2))

    def gram(self) -> Tensor:
        """Inner products of the vectors of this stack, [count, count], float64 on the CPU, computed in float64."""
        return self._total((name, _gram(_rows(t))) for name, t in self.tensors.items())

    def combined(self, coefficients: Tensor) -> Shards:
        """The stack of linear combinations of this stack's vectors, computed in float64, float32.

        Args:
            coefficients: [new count, count].
        """
        return self.like({name: _combined(t, coefficients) for name, t in self.tensors.items()})

    @torch.no_grad()
    def add_combined_(self, stack: Shards, coefficients: Tensor) -> Shards:
        """self += sum_k coefficients[k] * stack[k], in place; the sum is computed in float64; coefficients: [count].

        Large coefficients may cancel each other.
        """
        for name, t in self.tensors.items():
            t.add_(_combined(stack.tensors[name], coefficients[None])[0].to(t.dtype))
        return self._changed()

    @torch.no_grad()
    def exchange_(self, other: Shards, names: Sequence[str]) -> Shards:
        """Put the values of ``other`` here and those from here there, of these tensors."""
        for name in names:
            kept = self.tensors[name].clone()
            self.tensors[name].copy_(other.tensors[name])
            other.tensors[name].copy_(kept)
        return self._changed()

    def state(self, prefix: str) -> dict[str, Tensor]:
        """The whole tensors under ``prefix/name``, for a method's saved state.

        The main process saves them; in the others those that were divided are empty.
        """
        main, state = Process.this().main, {}
        for name, t in self.tensors.items():
            whole = self._join(name, t)
            state[f"{prefix}/{name}"] = t if whole is t else whole.cpu() if main else whole.new_empty(0)
        return state

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor], prefix: str, like: Shards, *, stacked: bool = False) -> Shards:
        """Read back what :meth:`state` gave, on the devices of ``like`` and divided as it is.

        Args:
            stacked: it was a stack of vectors.

        Raises:
            ValueError: a tensor is missing, or not of the shape of that of ``like``.
        """

        def one(name: str, t: Tensor) -> Tensor:
            shape = like.pieces[name].shape if name in like.pieces else t.shape
            whole = saved_tensor(state, f"{prefix}/{name}", *([None] if stacked else []), *shape)
            return like.piece(name, whole).to(t.device)

        return like.like({name: one(name, t) for name, t in like.tensors.items()})

    @torch.no_grad()
    def whole(self) -> Shards:
        """The vector in one piece, in every process, for a method that takes an adapter's matrices apart.

        Where nothing is divided that is this vector itself; otherwise a copy, and :meth:`load_` takes it back.
        """
        if not self.pieces:
            return self
        return Shards({name: self._join(name, t).to(t.device) for name, t in self.tensors.items()})

    @torch.no_grad()
    def add_whole_(self, name: str, whole: Tensor, scale: float = 1.0) -> Shards:
        """self[name] += scale * whole, in place, of which this process takes its piece."""
        t = self.tensors[name]
        t.add_(self.piece(name, whole).to(t.dtype), alpha=scale)
        return self._changed()

    @torch.no_grad()
    def load_(self, whole: Mapping[str, Tensor]) -> Shards:
        """Take the values of whole tensors by name; a name that is not there is left as it is."""
        for name, t in self.tensors.items():
            if name in whole:
                t.copy_(self.piece(name, whole[name]))
        return self._changed()

    def piece(self, name: str, whole: Tensor) -> Tensor:
        """What this process holds of a whole tensor of a parameter's shape, or of a stack of such."""
        if name not in self.pieces:
            return whole
        take = self.pieces[name].take
        stacked = whole.dim() > len(self.pieces[name].shape)
        return torch.stack([take(row) for row in whole]) if stacked else take(whole)

    def _join(self, name: str, t: Tensor) -> Tensor:
        """The whole tensor of a parameter's shape, or a stack of such, that all processes hold pieces of."""
        return self.pieces[name].join(t) if name in self.pieces else t

    def _products(self, other: Shards, product: Callable[[Tensor, Tensor], Tensor], dim: int) -> Iterator[Value]:
        """A product of each tensor of this vector (dim 1) or stack (2) with that of a vector: float32 products."""
        for name, t in self.tensors.items():
            own = t.detach().float()
            yield (
                name,
                product(own.flatten() if dim == 1 else _rows(own), other.tensors[name].detach().flatten().float()),
            )

    def _total(self, values: Iterable[Value]) -> Tensor:
        """The sum over tensors, and over the processes that hold pieces of one, in float64 on the CPU."""
        undivided, divided = torch.zeros(()), torch.zeros(())
        for name, value in values:
            if name in self.pieces:
                divided = divided + value.cpu().double()
            else:
                undivided = undivided + value.cpu().double()
        return undivided + Process.this().all_reduce_sum(divided.double()) if self.pieces else undivided

    def _changed(self) -> Shards:
        if self._written is not None:
            self._written()
        return self


Value = tuple[str, Tensor]


def _rows(t: Tensor) -> Tensor:
    """A stack's tensor [count, ...] as a matrix [count, entries]."""
    return t.reshape(len(t), -1)


def _combined(t: Tensor, coefficients: Tensor) -> Tensor:
    """Linear combinations of a stack's tensor [count, ...], computed in float64: float32 [new count, ...]."""
    factors = to_float64(coefficients.to(t.device))
    parts = [(factors @ to_float64(part)).to(t.device, torch.float32) for part in _rows(t).split(CHUNK, dim=1)]
    return torch.cat(parts, dim=1).reshape(len(factors), *t.shape[1:])


def _gram(rows: Tensor) -> Tensor:
    """Inner products of rows, [count, count], float64 on the CPU, computed in float64."""
    total = torch.zeros(len(rows), len(rows), dtype=torch.float64)
    for part in rows.split(CHUNK, dim=1):
        wide = to_float64(part)
        total += (wide @ wide.T).cpu()
    return total
