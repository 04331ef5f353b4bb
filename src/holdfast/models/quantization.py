"""QLoRA: the frozen weights of a model in 4 bits (Dettmers et al., 2023, arXiv 2305.14314), by bitsandbytes."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

from holdfast.config.model import ModelConfig
from holdfast.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def check_quantization(model: ModelConfig, tuner: str, frozen_weights: bool) -> None:
    """Check that the model can be quantised on this machine and with this tuner.

    Args:
        tuner: its name.
        frozen_weights: whether it leaves the model's own weights as they are.

    Raises:
        ConfigError: it cannot.
    """
    if model.quantization is None:
        return
    if not frozen_weights:
        raise ConfigError(
            f"model.quantization: tuner {tuner!r} trains or decomposes the model's own weights, which must not be "
            "quantised then; leave it out, or use a tuner that adds weights, such as lora"
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            "model.quantization: 4bit needs bitsandbytes, which is not installed; `pip install bitsandbytes` installs "
            "it, or leave the key out"
        )


def weight_options(model: ModelConfig, device: str) -> dict[str, Any]:
    """Arguments of ``from_pretrained`` for the data type and the quantisation of a model's weights.

    4 bits are those of QLoRA: NF4, with quantised constants (double quantisation). The data type of computation is
    ``model.dtype``; if that is stored, it is bfloat16, as in the paper.

    Args:
        model: its ``dtype`` is settled, no longer auto.
    """
    assert model.dtype != "auto", "the data type is settled before weights are loaded"
    if model.quantization is None:
        return {"dtype": "auto" if model.dtype == "stored" else model.dtype}
    import torch
    from transformers import BitsAndBytesConfig

    dtype = torch.float32 if model.dtype == "float32" else torch.bfloat16
    return {
        "dtype": dtype,
        "device_map": {"": device},
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        ),
    }


def ready_for_training(model: PreTrainedModel) -> PreTrainedModel:
    """Freeze a quantised model, with norms and embeddings in float32.

    On CPUs with AVX512-BF16, bitsandbytes 0.50 repacks a layer's weights in its first forward pass: permanently, with a
    loss of precision, and such that no gradient passes through the layer. This function turns that off.
    """
    from peft import prepare_model_for_kbit_training

    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
