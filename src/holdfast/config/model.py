"""Which pretrained model a run starts from."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from holdfast.config.section import Section


class ModelConfig(Section):
    """Which pretrained model to start from."""

    example: ClassVar[str] = "{name: Qwen/Qwen3-0.6B}"
    name_alone: ClassVar[bool] = True

    name: str = Field(description="folder, .gguf file or hub name of a causal language model with its tokenizer")
    revision: str | None = Field(None, description="branch, tag or commit on the hub")
    dtype: Literal["auto", "float32", "bfloat16", "stored"] = Field(
        "auto",
        description="data type of the weights; auto: frozen weights in bfloat16 where this machine is faster in it, "
        "others in float32; stored: as in the checkpoint",
    )
    quantization: Literal["4bit"] | None = Field(
        None, description="hold the frozen weights in 4 bits (NF4, QLoRA) and compute in dtype; needs bitsandbytes"
    )
    attention: str | None = Field(
        None, description="attention implementation of transformers (eager, sdpa, flash_attention_2, ...)"
    )
    trust_remote_code: bool = Field(False, description="run Python code that comes with this model; off unless you ask")
