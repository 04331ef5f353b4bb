"""Vector algebra over the trainable parameters and their gradients, however an engine has laid them out.

Nothing here gathers a whole vector but :meth:`Shards.state`, one tensor at a time, for saving.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from holdfast import zero
from holdfast.process import Process

CHUNK = 1 << 18
"""Columns of a stack that are held in float64 at a time."""


class Piece(Protocol):
    """How a parameter is divided among processes."""

    shape: torch.Size
    """Of the whole parameter."""

    def take(self, whole: Tensor) -> Tensor:
        """This process's piece of a tensor of the parameter's shape."""

    def join(self, piece: Tensor) -> Tensor:
        """The whole tensor, of every process's piece, on the CPU; on every process but the main one it may be empty."""


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
        sums = torch.stack([t.detach().float().abs().sum() for t in self]).double().cpu()
        divided = torch.tensor([name in self.pieces for name in self.tensors])
        return torch.where(divided, Process.this().sum(sums), sums) if self.pieces else sums

    @torch.no_grad()
    def add_(self, other: Shards, scale: float = 1.0) -> Shards:
        """self += scale * other, in place."""
        for name, t in self.tensors.items():
            t.add_(other.tensors[name].to(t.dtype), alpha=scale)
        return self._changed()

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
        vectors = {}
        for name, t in self.tensors.items():
            factors = coefficients.to(t.device, torch.float64)
            parts = [(factors @ part.double()).float() for part in _rows(t).split(CHUNK, dim=1)]
            vectors[name] = torch.cat(parts, dim=1).reshape(len(factors), *t.shape[1:])
        return self.like(vectors)

    @torch.no_grad()
    def add_combined_(self, stack: Shards, coefficients: Tensor) -> Shards:
        """self += sum_k coefficients[k] * stack[k], in place, in float32; coefficients: [count]."""
        for name, t in self.tensors.items():
            factors = coefficients.to(t.device, torch.float32)
            t.add_((factors @ _rows(stack.tensors[name])).reshape(t.shape).to(t.dtype))
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
        """The whole tensors under ``prefix/name``, for a method's saved state; the main process saves them."""
        return {
            f"{prefix}/{name}": self.pieces[name].join(t) if name in self.pieces else t
            for name, t in self.tensors.items()
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor], prefix: str, like: Shards) -> Shards:
        """Read back what :meth:`state` gave, on the devices of ``like`` and divided as it is."""
        return like.like(
            {name: like.piece(name, state[f"{prefix}/{name}"]).to(t.device) for name, t in like.tensors.items()}
        )

    @torch.no_grad()
    def whole(self) -> Shards:
        """The vector in one piece, in every process, for a method that takes an adapter's matrices apart.

        Where nothing is divided that is this vector itself; otherwise a copy, and :meth:`load_` takes it back.
        """
        parts = {name: piece for name, piece in self.pieces.items() if isinstance(piece, zero.Part)}
        sharded = {name: piece for name, piece in self.pieces.items() if name not in parts}
        if not self.pieces:
            return self
        found = dict(self.tensors)
        found |= {name: piece.join(found[name]).to(found[name].device) for name, piece in sharded.items()}
        return Shards(found | (zero.joined(parts, self.tensors) if parts else {}))

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
                divided = divided + value.double().cpu()
            else:
                undivided = undivided + value.double().cpu()
        return undivided + Process.this().sum(divided.double()) if self.pieces else undivided

    def _changed(self) -> Shards:
        if self._written is not None:
            self._written()
        return self


Value = tuple[str, Tensor]


class _Sharded:
    """A piece of a parameter that FSDP2 shards."""

    def __init__(self, parameter: DTensor):
        self.shape = parameter.shape
        self._stride = parameter.stride()
        self._mesh, self._placements = parameter.device_mesh, parameter.placements

    def take(self, whole: Tensor) -> Tensor:
        return self.like(whole).to_local()

    def like(self, whole: Tensor) -> DTensor:
        """A tensor that is divided as the parameter is, such as its optimizer's state."""
        return distribute_tensor(whole.to(self._mesh.device_type), self._mesh, self._placements, src_data_rank=None)

    def holds(self, value: Tensor) -> bool:
        """Whether a tensor of the optimizer's state is divided as the parameter is."""
        return value.shape == self.shape

    def join(self, piece: Tensor) -> Tensor:
        if piece.dim() > len(self.shape):
            return torch.stack([self.join(row) for row in piece])
        local = piece.to(self._mesh.device_type)
        joined = DTensor.from_local(
            local, self._mesh, self._placements, run_check=False, shape=self.shape, stride=self._stride
        )
        return joined.full_tensor().cpu()


def _rows(t: Tensor) -> Tensor:
    """A stack's tensor [count, ...] as a matrix [count, entries]."""
    return t.reshape(len(t), -1)


def _gram(rows: Tensor) -> Tensor:
    """Inner products of rows, [count, count], float64 on the CPU, computed in float64."""
    total = torch.zeros(len(rows), len(rows), dtype=torch.float64)
    for part in rows.split(CHUNK, dim=1):
        total += (part.double() @ part.double().T).cpu()
    return total


def piece_of(p: Tensor) -> _Sharded | zero.Part | None:
    """How a parameter is divided; None where it is whole."""
    if zero.lies_here(p):
        return zero.part(p)
    return _Sharded(p) if isinstance(p, DTensor) else None


def at_rest(model: nn.Module) -> None:
    """Let FSDP2 put away the whole weights that it keeps after a forward pass until the backward pass."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable parameters by name, as they lie between passes through the model."""
    at_rest(model)
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def is_divided(model: nn.Module) -> bool:
    """Whether a part of the model lies in pieces, so that processes go through it together or not at all."""
    return any(isinstance(p, DTensor) or zero.is_partitioned(p) for p in model.parameters())


def full(t: Tensor) -> Tensor:
    """A parameter in one piece, on its device; every process must ask for it."""
    if zero.is_partitioned(t):
        return zero.whole(t)
    return t.full_tensor() if isinstance(t, DTensor) else t


def used(p: Tensor) -> Tensor:
    """A parameter to compute with outside its module, in one piece and with gradient; every process must ask for it."""
    return zero.followed(p) if zero.is_partitioned(p) else p


def whole_state(model: nn.Module) -> dict[str, Tensor] | None:
    """What ``save_pretrained`` needs as ``state_dict`` where it cannot gather the weights itself; else None.

    The tensors are gathered one by one, for the main process alone, on the CPU; of an adapter, its own.
    """
    if not any(map(zero.is_partitioned, model.parameters())):
        return None
    state, joined = {}, {}
    for name, t in _saved(model):
        if id(t) not in joined:  # tied weights stay one tensor
            whole = full(t).detach()
            joined[id(t)] = whole.cpu() if Process.this().main else whole.new_empty(0)
        state[name] = joined[id(t)]
    return state


def saves_together(model: nn.Module) -> bool:
    """Whether all processes must take part when it is saved: soft prompts are, as what their network makes."""
    return is_divided(model) and hasattr(model, "prompt_encoder")


def loading(model: nn.Module) -> AbstractContextManager[None]:
    """Within it ``load_state_dict`` finds whole weights, and each process has the same to load."""
    return zero.loading(model, [t for _, t in _saved(model)])


def _saved(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The tensors that ``save_pretrained`` writes, by name: of a model with adapters, the adapters' alone."""
    prefix = getattr(getattr(model, "base_model", None), "prefix", None) if hasattr(model, "peft_config") else None
    for name, t in model.state_dict(keep_vars=True).items():
        if prefix is None or t.requires_grad or prefix in name or not name.startswith("base_model.model."):
            yield name, t


def weights(model: nn.Module) -> Shards:
    """A live view on the trainable parameters, as the optimizer has them."""
    return _view(model, lambda p: zero.weight(p) if zero.lies_here(p) else p.data, lambda: zero.agree(model))


def _view(model: nn.Module, of: Callable[[nn.Parameter], Tensor], written: Callable[[], None] | None = None) -> Shards:
    """A vector of what belongs to each trainable parameter: itself, or its gradient."""
    tensors: dict[str, Tensor] = {}
    pieces: dict[str, Piece] = {}
    for name, p in trainable(model).items():
        t = of(p)
        if (piece := piece_of(p)) is not None:
            pieces[name] = piece
            t = t.to_local() if isinstance(t, DTensor) else t
        tensors[name] = t
    return Shards(tensors, pieces, written)


def snapshot(model: nn.Module) -> Shards:
    """A copy of the trainable parameters as they are, in their own data types, on the CPU."""
    theta = weights(model)
    return theta.like({name: t.to("cpu", copy=True) for name, t in theta.tensors.items()})


@contextmanager
def borrowed(model: nn.Module) -> Iterator[Shards]:
    """A live view on the trainable parameters, which may be changed inside; after, they are as before, bit for bit."""
    theta = weights(model)
    kept = theta.like({name: t.clone() for name, t in theta.tensors.items()})
    try:
        yield theta
    finally:
        theta.copy_(kept)


def gradients(model: nn.Module) -> Shards:
    """A live view on the accumulated gradients; a parameter that got none gets a zero gradient."""

    def gradient(p: nn.Parameter) -> Tensor:
        if zero.lies_here(p):
            return zero.gradient(p)
        if p.grad is None:
            p.grad = torch.zeros_like(p)
        return p.grad

    return _view(model, gradient)


def average_replicated(model: nn.Module) -> None:
    """Average over processes the accumulated gradients of the weights that FSDP2 does not divide, a tuner's own."""
    if any(isinstance(p, DTensor) for p in model.parameters()):
        found, process = gradients(model), Process.this()
        whole = Shards({name: t for name, t in found.tensors.items() if name not in found.pieces})
        process.sum_all(whole).scale_(1 / process.world)


def gradient_of(loss: Tensor, model: nn.Module) -> Shards:
    """The gradient of a scalar at the current weights, float32; accumulated gradients stay as they are.

    The scalar is the same on all processes: each has gone through the same rows.
    """
    return _gradient([loss], model)


def gradient_of_sum(losses: Iterable[Tensor], model: nn.Module) -> Shards:
    """The gradient of the sum over all processes and all their ``losses``, as :func:`gradient_of`.

    Every process gives as many scalars; each is computed when it is asked for, so that one graph is held at a time.
    """
    world = Process.this().world
    if any(map(zero.lies_here, trainable(model).values())):
        return _by_zero(losses, model, divide=True)
    if not any(isinstance(p, DTensor) for p in trainable(model).values()):
        return Process.this().sum_all(_gradient(losses, model))
    return _gradient(losses, model).scale_(world)  # FSDP2 has taken the mean


def gradients_of_sums(groups: Iterable[Iterable[Tensor]], model: nn.Module) -> Shards:
    """A stack of such gradients, one a group of scalars; where all processes hold all of it, by one all-reduce."""
    if any(piece_of(p) for p in trainable(model).values()):
        return Shards.stack([gradient_of_sum(losses, model) for losses in groups])
    return Process.this().sum_all(Shards.stack([_gradient(losses, model) for losses in groups]))


def _gradient(losses: Iterable[Tensor], model: nn.Module) -> Shards:
    """The gradient of the sum of this process's scalars."""
    parameters = trainable(model)
    if any(map(zero.lies_here, parameters.values())):
        return _by_zero(losses, model, divide=False)
    if any(isinstance(p, DTensor) for p in parameters.values()):
        return _gradient_by_backward(losses, model)
    total: dict[str, Tensor] = {}
    for loss in losses:
        found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        for (name, p), g in zip(parameters.items(), found, strict=True):
            part = torch.zeros_like(p, dtype=torch.float32) if g is None else g.float()
            total[name] = total[name].add_(part) if name in total else part
    return Shards(total)


def _by_zero(losses: Iterable[Tensor], model: nn.Module, divide: bool) -> Shards:
    """The same where DeepSpeed's ZeRO divides the parameters."""
    parameters = trainable(model)
    found = zero.gradient_of_sum(losses, parameters, divide)
    return Shards(found, {name: zero.part(p) for name, p in parameters.items()})


def _gradient_by_backward(losses: Iterable[Tensor], model: nn.Module) -> Shards:
    """The same where FSDP2 shards the gradients as they come, in its own backward pass."""
    parameters = trainable(model)
    accumulated = {name: p.grad for name, p in parameters.items()}
    for p in parameters.values():
        p.grad = None
    try:
        for loss in losses:
            loss.backward()
        found = gradients(model)
        return found.like({name: g.float() for name, g in found.tensors.items()})
    finally:
        for name, p in parameters.items():
            p.grad = accumulated[name]


def fingerprint(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 (hexadecimal) over the names, types, shapes and bytes of whole tensors, in order."""
    digest = hashlib.sha256()
    for name, t in ((name, full(t)) for name, t in tensors):
        digest.update(f"{name} {t.dtype} {list(t.shape)}\n".encode())
        digest.update(t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
