"""How much memory training takes, from a model's configuration alone: no weight is loaded or made.

The model, with its tuner, stands on the meta device; what autograd would keep of a forward pass is counted by a pass
over fake tensors, which have shapes and types and no values. At its fullest, a step holds

    weights + optimizer + max(activations + logits, gradients + update)

since gradients come into being as activations go. Where a step accumulates over several micro-batches, the gradients
of those before are there all along:

    weights + optimizer + gradients + max(activations + logits, update)

With checkpointing, the activations are what lies outside of the decoder blocks, the input of each block, and all of
the one block that is recomputed at a time.

On a CPU, what the tensors hold is not all: glibc keeps those of less than 32 MiB in a heap, where a hole does not serve
for an aligned tensor of its own size, so that a pass leaves holes, which stay with the process. They are taken to be
:data:`HOLES` of the activations, on top of either phase.
"""

from __future__ import annotations

import copy
import os
import platform
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from holdfast.api.tuner import Tuner
from holdfast.config.training import TrainingConfig
from holdfast.errors import ConfigError
from holdfast.models.head import base

NF4_BITS = 4.127
"""Bits a weight in QLoRA's NF4 with double quantisation (Dettmers et al., 2023, arXiv 2305.14314, section 3)."""

HOLES = 0.7
"""Holes in glibc's heap, as a share of those activations that lie in it: measured, by ``benchmarks/memory.py``."""

IN_HEAP = 32 * 2**20
"""Bytes from which glibc always maps a tensor apart."""

STEPS = 1000
"""Optimizer steps that a tuner is told of, where it asks; its memory does not depend on them."""


@dataclass(frozen=True)
class Memory:
    """What training holds, in bytes.

    Attributes:
        trained: how many parameters are trained; a count, no bytes.
        weights: of the whole model, with what the tuner adds, and its buffers.
        gradients: of the trained parameters, in their data type.
        optimizer: AdamW's two averages for each trained parameter, in its data type.
        update: what AdamW's step makes for a moment: on a GPU, where it works on all parameters together, as much as
            the trained ones; on a CPU, parameter by parameter, twice the largest.
        activations: what autograd keeps of a micro-batch's forward pass up to the logits; in mixed precision also the
            weights as they were cast.
        checkpointed: the same with activation checkpointing; None where the tuner cannot train so.
        logits: log-probabilities, their gradient and that of the logits, 3 x 4 bytes x rows x length x vocabulary.
        holes: in the heap, where the process has glibc's with its own settings.
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
        """The most that a step holds at a time, bytes.

        Args:
            checkpointing: activations are recomputed in the backward pass.
            accumulation: a step has several micro-batches.
        """
        activations = self.checkpointed if checkpointing else self.activations
        assert activations is not None, "this tuner cannot train with checkpointing"
        forward, update, held = activations + self.logits, self.update, self.weights + self.optimizer + self.holes
        if accumulation:
            return held + self.gradients + max(forward, update)
        return held + max(forward, self.gradients + update)


class Estimate:
    """The memory of one model with one tuner, at any size of a micro-batch."""

    def __init__(
        self,
        config: PretrainedConfig,
        tuner: Tuner,
        max_length: int,
        precision: Literal["float32", "bfloat16"] = "float32",
        device: str = "cpu",
    ):
        """
        Args:
            config: of a causal language model of transformers; its weights are float32.
            tuner: which weights are trained.
            max_length: tokens of a row.
            precision: bfloat16 is mixed precision, as ``training.precision``.
            device: cpu or cuda, where it would train.

        Raises:
            ConfigError: the tuner does not take this model, or what it keeps depends on values.
        """
        tuner.plan(TrainingConfig(), STEPS)
        self.tuner = tuner
        self.max_length, self.precision, self.device = max_length, precision, device
        model = _prepared(config, tuner)
        trained = [p for p in model.parameters() if p.requires_grad]
        sizes = [p.nbytes for p in trained]
        self._fixed = {
            "trained": sum(p.numel() for p in trained),
            "weights": sum(t.nbytes for t in [*model.parameters(), *model.buffers()]),
            "gradients": sum(sizes),
            "optimizer": 2 * sum(sizes),
            "update": sum(sizes) if device == "cuda" else 2 * max(sizes, default=0),
        }
        self._in_4bit = int(_in_4bit(model)) if tuner.quantized else None
        self._can_checkpoint = _can_checkpoint(tuner)
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        with self._mode:
            _exchange(model, device)
        self._model = model
        self._known: dict[int, Memory] = {}

    def memory(self, rows: int, quantized: bool = False) -> Memory:
        """What training takes.

        Args:
            rows: in a micro-batch.
            quantized: the frozen weights are in 4 bits (``model.quantization: 4bit``).

        Raises:
            ConfigError: what the model keeps depends on values, not on shapes alone.
        """
        if rows not in self._known:
            self._known[rows] = Memory(**self._fixed, **self._forward(rows))
        memory = self._known[rows]
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
                f"{type(base(self._model)).__name__} with tuner {self.tuner.name}: how much it keeps depends on the "
                "values that it computes (as a mixture of experts does), so that shapes alone do not say"
            ) from None
        blocks = saved.blocks
        inputs = sum(size for size, kept in zip(saved.inputs, blocks, strict=True) if kept)  # none of a frozen block
        checkpointed = saved.outside + inputs + max(blocks, default=0)
        return {
            "activations": saved.outside + sum(blocks),
            "checkpointed": checkpointed if self._can_checkpoint else None,
            "logits": 3 * 4 * saved.logits,
            "holes": round(HOLES * saved.in_heap) if self.device == "cpu" and heap_keeps_holes() else 0,
        }


@dataclass
class Saved:
    """What autograd keeps of a forward pass, bytes.

    Attributes:
        outside: of the decoder blocks.
        blocks: by each of them that no earlier one kept.
        inputs: the hidden states that each gets.
        logits: how many numbers the head gives; a count, no bytes.
        in_heap: of all of it, what lies in glibc's heap.
    """

    outside: int
    blocks: list[int]
    inputs: list[int]
    logits: int
    in_heap: int = 0


def _saved(model: Any, rows: int, length: int, precision: str, device: str) -> Saved:
    """Call the model on a batch of fake tokens and count the storages that autograd is given to keep."""
    blocks = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    found = Saved(0, [0] * len(blocks), [0] * len(blocks), 0)
    own = {_storage(t) for t in [*model.parameters(), *model.buffers()]}
    kept: list[Tensor] = []  # alive, so that no storage takes another's place
    inside: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        if _storage(tensor) not in own:
            own.add(_storage(tensor))
            kept.append(tensor)
            size = tensor.untyped_storage().nbytes()
            found.in_heap += size if size < IN_HEAP else 0
            if inside:
                found.blocks[inside[-1]] += size
            else:
                found.outside += size
        return tensor

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        place = blocks.index(module)
        inside.append(place)
        hidden = args[0] if args else kwargs["hidden_states"]
        found.inputs[place] = hidden.nbytes

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        inside.pop()

    def head(module: nn.Module, args: Any, output: Tensor) -> None:
        found.logits = output.numel()

    hooks = [block.register_forward_pre_hook(enter, with_kwargs=True) for block in blocks]
    hooks += [block.register_forward_hook(leave) for block in blocks]
    hooks += [base(model).get_output_embeddings().register_forward_hook(head)]
    ids = torch.zeros(rows, length, dtype=torch.int64, device=device)
    mixed = torch.autocast(device, torch.bfloat16, enabled=precision == "bfloat16")
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), mixed:
            model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _prepared(config: PretrainedConfig, tuner: Tuner) -> Any:
    """The model with its tuner on the meta device, in training mode."""

    def made() -> Any:
        return AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32)

    with torch.device("meta"):
        try:
            model = tuner.prepare(made())
        except RuntimeError:  # it tried the model out, which asks for values; of fake tensors transformers asks none
            with FakeTensorMode(allow_non_fake_inputs=True):
                model = tuner.prepare(made())
    return model.train()


def _exchange(model: nn.Module, device: str) -> None:
    """Put fake tensors of a device in the place of meta ones; within the mode. Autocast passes meta tensors over."""
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
    """Bytes of the weights if the frozen linear layers but the head are in 4 bits, and all else is in float32."""
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


def advice(estimate: Estimate, rows: int, free: int) -> str | None:
    """The least change of a run's configuration with which it would fit, or None where none of these is enough.

    In this order: checkpointing, smaller micro-batches, both, and the same with the frozen weights in 4 bits.

    Args:
        rows: in a micro-batch as it is asked for.
        free: bytes.
    """
    smaller = [rows >> halvings for halvings in range(1, rows.bit_length())]
    for quantized in (False, True) if estimate.tuner.quantized else (False,):
        for micro, checkpointing in [
            *([(rows, False)] if quantized else []),
            (rows, True),
            *((micro, False) for micro in smaller),
            *((micro, True) for micro in smaller),
        ]:
            memory = estimate.memory(micro, quantized)
            if checkpointing and memory.checkpointed is None:
                continue
            if memory.peak(checkpointing, accumulation=micro < rows) <= free:
                changes = ["model.quantization: 4bit"] if quantized else []
                changes += ["training.gradient_checkpointing: true"] if checkpointing else []
                changes += [f"training.micro_batch_size: {micro}"] if micro < rows else []
                return ", ".join(changes)
    return None


def heap_keeps_holes() -> bool:
    """Whether this process has glibc's heap, and no MALLOC_MMAP_THRESHOLD_ by which tensors lie outside of it."""
    return platform.libc_ver()[0] == "glibc" and "MALLOC_MMAP_THRESHOLD_" not in os.environ


def free_memory(device: str) -> int:
    """Bytes that are free on this machine: of its first GPU, or of main memory."""
    if device == "cuda":
        return torch.cuda.mem_get_info(0)[0]
    import psutil  # type: ignore[import-untyped]

    return psutil.virtual_memory().available
