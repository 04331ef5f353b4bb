"""The memory that training needs, estimated from a model's configuration alone: no weight is loaded or made.

The model and its tuner are built on the meta device. A forward pass over fake tensors, which have shapes and types but
no values, counts what autograd would keep. The peak of a step is

    weights + optimizer + max(activations + logits, gradients + update)

since the backward pass frees activations while it makes gradients. Where a step has several micro-batches, the
gradients of the earlier ones stay in memory:

    weights + optimizer + gradients + max(activations + logits, update)

With activation checkpointing, the activations are those outside of the decoder blocks, the input of each block, and all
activations of the one block that is being recomputed.

On a CPU a process holds more than its tensors. glibc puts tensors below 32 MiB in a heap, and cannot use a hole there
for an aligned tensor of the same size. So a pass leaves holes, which stay with the process. The estimate for them is
:data:`HOLES` of the activations, added to the peak.
"""

from __future__ import annotations

import copy
import os
import platform
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from transformers import PretrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from holdfast.api.tuner import Tuner
from holdfast.config.training import TrainingConfig
from holdfast.errors import ConfigError
from holdfast.models.attention import fastest
from holdfast.models.head import base
from holdfast.models.kinds import auto_class
from holdfast.models.precision import Type
from holdfast.models.seq2seq import reads_apart
from holdfast.system.device import free_gpu_memory
from holdfast.training.requirements import check_kind

NF4_BITS = 4.127
"""Bits a weight in QLoRA's NF4 with double quantisation (Dettmers et al., 2023, arXiv 2305.14314, section 3)."""

HOLES = 0.7
"""Holes in glibc's heap, as a share of the activations in the heap; measured by ``benchmarks/memory.py``."""

IN_HEAP = 32 * 2**20
"""Size in bytes from which glibc always maps a tensor outside of its heap."""

STEPS = 1000
"""Optimizer steps of the run that a tuner is told; its memory does not depend on them."""


@dataclass(frozen=True)
class Memory:
    """The parts of training's memory, in bytes.

    Attributes:
        trained: number of trained parameters; a count, not bytes.
        weights: all weights and buffers, with those that the tuner adds.
        gradients: of the trained parameters, in their data type.
        optimizer: AdamW's two averages for each trained parameter, in its data type.
        update: temporary tensors of AdamW's step: on a GPU, which updates all parameters together, as large as the
            trained ones; on a CPU, which updates one after another, twice the largest one.
        activations: what autograd keeps of a micro-batch's forward pass up to the logits; in mixed precision also the
            weights that were cast.
        checkpointed: the same with activation checkpointing; None where the tuner does not support it.
        logits: log-probabilities, their gradient and that of the logits: 3 x 4 bytes x rows x length x vocabulary.
        holes: in the heap, where the process uses glibc's heap with its default settings.
    """

    trained: int
    weights: int
    gradients: int
    optimizer: int
    update: int
    activations: int
    checkpointed: int | None
    logits: int
    holes: int = 0

    def peak(self, checkpointing: bool = False, accumulation: bool = False) -> int:
        """Peak memory of a step, bytes.

        Args:
            checkpointing: the backward pass recomputes activations.
            accumulation: a step has several micro-batches.
        """
        activations = self.checkpointed if checkpointing else self.activations
        assert activations is not None, "this tuner cannot train with checkpointing"
        forward, update, held = activations + self.logits, self.update, self.weights + self.optimizer + self.holes
        if accumulation:
            return held + self.gradients + max(forward, update)
        return held + max(forward, self.gradients + update)


class Estimate:
    """Estimates the memory of one model with one tuner, for micro-batches of any size."""

    def __init__(
        self,
        config: PretrainedConfig,
        tuner: Tuner,
        max_length: int,
        precision: Type = "float32",
        device: str = "cpu",
        dtype: Type = "float32",
    ):
        """
        Args:
            config: of a language model of transformers.
            tuner: which weights are trained.
            max_length: tokens of a row; of a sequence-to-sequence model, of a prompt and of an answer.
            precision: bfloat16 is mixed precision, as ``training.precision``.
            device: where training would run, as :func:`~holdfast.system.device.device_type` names it.
            dtype: of the model's own weights, as ``model.dtype``.

        Raises:
            ConfigError: the tuner does not support this model.
        """
        check_kind(config, [tuner])
        tuner.plan(TrainingConfig(), STEPS)
        self.tuner = tuner
        self.max_length, self.precision, self.device = max_length, precision, device
        model = _prepared(config, tuner, dtype, fastest(precision) if device == "cpu" else None)
        trained = [p for p in model.parameters() if p.requires_grad]
        sizes = [p.nbytes for p in trained]
        self._fixed = {
            "trained": sum(p.numel() for p in trained),
            "weights": sum(t.nbytes for t in [*model.parameters(), *model.buffers()]),
            "gradients": sum(sizes),
            "optimizer": 2 * sum(sizes),
            "update": sum(sizes) if device != "cpu" else 2 * max(sizes, default=0),
        }
        self._in_4bit = int(_in_4bit(model)) if tuner.quantized else None
        self._can_checkpoint = _can_checkpoint(tuner)
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        with self._mode:
            _exchange(model, device)
        self._model = model
        self._by_rows: dict[int, Memory] = {}

    def memory(self, rows: int, quantized: bool = False) -> Memory:
        """The memory of training with micro-batches of some size.

        Args:
            rows: rows of a micro-batch.
            quantized: the frozen weights are in 4 bits (``model.quantization: 4bit``).

        Raises:
            ConfigError: what autograd keeps depends on values, not on shapes alone.
        """
        if rows not in self._by_rows:
            self._by_rows[rows] = Memory(**self._fixed, **self._forward(rows))
        memory = self._by_rows[rows]
        if quantized:
            assert self._in_4bit is not None, "this tuner trains the model's own weights"
            memory = replace(memory, weights=self._in_4bit)
        return memory

    def _forward(self, rows: int) -> dict[str, Any]:
        try:
            with self._mode:
                saved = _saved(self._model, rows, self.max_length, self.precision, self.device)
        except (DataDependentOutputException, DynamicOutputShapeException):
            raise ConfigError(
                f"{type(base(self._model)).__name__} with tuner {self.tuner.name}: its memory depends on the values "
                "that it computes, as with a mixture of experts, so that shapes alone do not tell it"
            ) from None
        blocks = saved.blocks
        inputs = sum(size for size, block in zip(saved.inputs, blocks, strict=True) if block)  # none of a frozen block
        checkpointed = saved.outside + inputs + max(blocks, default=0)
        return {
            "activations": saved.outside + sum(blocks),
            "checkpointed": checkpointed if self._can_checkpoint else None,
            "logits": 3 * 4 * saved.logits,
            "holes": round(HOLES * saved.in_heap) if self.device == "cpu" and heap_keeps_holes() else 0,
        }


@dataclass
class Saved:
    """What autograd keeps of a forward pass, in bytes.

    Attributes:
        outside: outside of the decoder blocks.
        blocks: in each decoder block, without tensors that an earlier one keeps already.
        inputs: the hidden states that each block gets.
        logits: how many numbers the head gives; a count, not bytes.
        in_heap: the part of all this that lies in glibc's heap.
    """

    outside: int
    blocks: list[int]
    inputs: list[int]
    logits: int
    in_heap: int = 0


def _saved(model: Any, rows: int, length: int, precision: str, device: str) -> Saved:
    """Call the model on a batch of fake tokens and count the storages that autograd keeps."""
    blocks = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    saved = Saved(0, [0] * len(blocks), [0] * len(blocks), 0)
    counted = {_storage(t) for t in [*model.parameters(), *model.buffers()]}
    alive: list[Tensor] = []  # so that no storage gets the address of one that was freed
    inside: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        if _storage(tensor) not in counted:
            counted.add(_storage(tensor))
            alive.append(tensor)
            size = tensor.untyped_storage().nbytes()
            saved.in_heap += size if size < IN_HEAP else 0
            if inside:
                saved.blocks[inside[-1]] += size
            else:
                saved.outside += size
        return tensor

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        place = blocks.index(module)
        inside.append(place)
        hidden = args[0] if args else kwargs["hidden_states"]
        saved.inputs[place] = hidden.nbytes

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        inside.pop()

    def head(module: nn.Module, args: Any, output: Tensor) -> None:
        saved.logits = output.numel()

    hooks = [block.register_forward_pre_hook(enter, with_kwargs=True) for block in blocks]
    hooks += [block.register_forward_hook(leave) for block in blocks]
    hooks += [base(model).get_output_embeddings().register_forward_hook(head)]
    ids = torch.zeros(rows, length, dtype=torch.int64, device=device)
    answers = {"decoder_input_ids": ids} if reads_apart(model) else {}
    mixed = torch.autocast(device, torch.bfloat16, enabled=precision == "bfloat16")
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), mixed:
            model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **answers)
    finally:
        for hook in hooks:
            hook.remove()
    return saved


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _prepared(config: PretrainedConfig, tuner: Tuner, dtype: Type, attention: str | None) -> Any:
    """The model with its tuner on the meta device, in training mode."""
    options = {"attn_implementation": attention} if attention else {}

    def new_model() -> Any:
        return auto_class(config).from_config(copy.deepcopy(config), dtype=getattr(torch, dtype), **options)

    with torch.device("meta"):
        try:
            model = tuner.prepare(new_model())
        except RuntimeError:  # the tuner calls the model, which fails on the meta device, but not with fake tensors
            with FakeTensorMode(allow_non_fake_inputs=True):
                model = tuner.prepare(new_model())
    return model.train()


def _exchange(model: nn.Module, device: str) -> None:
    """Replace meta tensors by fake tensors of a device, since autocast ignores meta tensors; call it in the mode."""
    done: dict[int, Any] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, old in tensors.items():
                if old is None:
                    continue
                if id(old) not in done:
                    new = torch.empty(old.shape, dtype=old.dtype, device=device)
                    done[id(old)] = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
                tensors[name] = done[id(old)]


def _in_4bit(model: Any) -> float:
    """Bytes of all weights, with the frozen linear layers except the head in 4 bits and the rest in float32."""
    head = base(model).get_output_embeddings()
    linear = {
        id(module.weight)
        for module in model.modules()
        if isinstance(module, nn.Linear) and module is not head and not module.weight.requires_grad
    }
    tensors = [*model.parameters(), *model.buffers()]
    return sum(t.numel() * (NF4_BITS / 8 if id(t) in linear else 4) for t in tensors)


def _can_checkpoint(tuner: Tuner) -> bool:
    try:
        tuner.plan(TrainingConfig(gradient_checkpointing=True), STEPS)
    except ConfigError:
        return False
    return True


def advice(
    estimate: Estimate, rows: int, free: int, checkpointing: bool = False, quantized: bool = False
) -> str | None:
    """The smallest change of a run's configuration that makes it fit into memory; None if no change is enough.

    The changes are tried in this order: checkpointing, smaller micro-batches, both, and then the same three with the
    frozen weights in 4 bits.

    Args:
        rows: rows of a micro-batch, as configured.
        free: free memory, bytes.
        checkpointing: whether it is configured.
        quantized: whether 4 bits are configured.
    """
    smaller = [rows >> halvings for halvings in range(1, rows.bit_length())]
    for in_4bit in (False, True) if estimate.tuner.quantized else (False,):
        for micro, recomputed in [
            (rows, False),
            (rows, True),
            *((micro, False) for micro in smaller),
            *((micro, True) for micro in smaller),
        ]:
            now = (micro, recomputed, in_4bit) == (rows, checkpointing, quantized)
            if now or recomputed < checkpointing or in_4bit < quantized:
                continue
            memory = estimate.memory(micro, in_4bit)
            if recomputed and memory.checkpointed is None:
                continue
            if memory.peak(recomputed, accumulation=micro < rows) <= free:
                changes = ["model.quantization: 4bit"] if in_4bit > quantized else []
                changes += ["training.gradient_checkpointing: true"] if recomputed > checkpointing else []
                changes += [f"training.micro_batch_size: {micro}"] if micro < rows else []
                return ", ".join(changes)
    return None


def heap_keeps_holes() -> bool:
    """Whether this process uses glibc's heap, and MALLOC_MMAP_THRESHOLD_ does not move tensors out of it."""
    return platform.libc_ver()[0] == "glibc" and "MALLOC_MMAP_THRESHOLD_" not in os.environ


def free_memory(device: str) -> int:
    """Free bytes of this machine's first GPU, or of its main memory."""
    if device != "cpu":
        return free_gpu_memory()
    import psutil  # type: ignore[import-untyped]

    return psutil.virtual_memory().available
