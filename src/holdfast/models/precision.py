"""The data types of a model's weights and of its training where they are left to ``auto``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from holdfast.models.kinds import auto_class, is_seq2seq, sees
from holdfast.system.device import gpu_has_bfloat16, on_gpu
from holdfast.system.machine import processor_flags

if TYPE_CHECKING:
    from transformers import PretrainedConfig

Type = Literal["float32", "bfloat16"]

NARROWEST = 384
"""Width from which a model is faster in bfloat16, however small its batches are (benchmarks/RESULTS.md)."""

PRODUCTS = {"avx512_bf16", "amx_bf16"}
"""Processor flags, as Linux names them, of instructions for products of bfloat16 matrices."""


@dataclass(frozen=True)
class Machine:
    """What of a machine decides in which data type it is fast.

    Attributes:
        gpu: it trains on a GPU.
        bfloat16: what it trains on has instructions for products of bfloat16 matrices.
    """

    gpu: bool
    bfloat16: bool

    @classmethod
    def this(cls) -> Machine:
        """This one."""
        return cls(True, gpu_has_bfloat16()) if on_gpu() else cls(False, bool(PRODUCTS & processor_flags()))


@dataclass(frozen=True)
class Precision:
    """In which data types a run holds its weights and computes.

    Attributes:
        weights: of the model's own weights, as ``model.dtype``; what is trained is float32 either way.
        computation: of training, as ``training.precision``.
        why: the reason, for people.
    """

    weights: Type
    computation: Type
    why: str


def fastest_precision(
    machine: Machine, model: PretrainedConfig, *, frozen: bool, quantized: bool = False, alone: bool = True
) -> Precision:
    """The data types that ``auto`` means.

    Args:
        model: the model's configuration.
        frozen: the tuner leaves the model's own weights as they are, so that they may be held in bfloat16.
        quantized: they are held in 4 bits.
        alone: each process has the whole model; where an engine divides it, its weights stay in one data type.
    """
    width = getattr(model.get_text_config(), "hidden_size", None) or 0
    if not machine.bfloat16:
        return _float32(f"this machine's {'GPU' if machine.gpu else 'processor'} has no instructions for bfloat16")
    if width < NARROWEST:
        return _float32(f"a model of width {width} is no faster in bfloat16")
    if not machine.gpu and (reason := _untried_on_a_cpu(model, quantized)):
        return _float32(f"{reason} in bfloat16 is not tried on a processor")
    rounded = frozen and (alone or quantized)
    why = "this machine is faster in it" + ("; trained weights are float32" if rounded else "")
    return Precision("bfloat16" if rounded else "float32", "bfloat16", why)


def counted(dtype: str) -> Type:
    """The data type that an estimate of memory counts with: float32, unless it is bfloat16."""
    return "bfloat16" if dtype == "bfloat16" else "float32"


def _float32(why: str) -> Precision:
    return Precision("float32", "float32", why)


def _untried_on_a_cpu(model: PretrainedConfig, quantized: bool) -> str | None:
    """The kind of a model whose speed and arithmetic in bfloat16 were not measured on a CPU; None: they were.

    It must take attention in float32, without which its backward pass in bfloat16 is slower than all of float32.
    """
    if quantized:
        return "a model in 4 bits"
    if is_seq2seq(model):
        return "a sequence-to-sequence model"
    if sees(model):
        return "a model that sees"
    if any(getattr(model, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts")):
        return "a mixture of experts"
    kind = auto_class(model)._model_mapping.get(type(model), None)
    takes_any = all(getattr(kind, name, False) for name in ("_supports_sdpa", "_supports_attention_backend"))
    if not takes_any or getattr(model, "attn_logit_softcapping", None) is not None:
        return f"a model of type {model.model_type}"
    return None
