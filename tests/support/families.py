"""Tiny models of the families that holdfast is tested with: random weights, each architecture's own peculiarities."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    Phi3Config,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from support.tiny import VOCABULARY, tiny_tokenizer

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ATTENTION = LINEAR[:4]

# Written as the families' own templates speak: who says what, where a turn ends, who may speak.
ROLES = """{% for message in messages %}{{ '[' + message.role + ']' + message.content + '</t>\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"""
BEGUN = "{{ bos_token }}" + ROLES
NO_SYSTEM = """{{ bos_token }}{% for message in messages %}{% if message.role == 'system' %}\
{{ raise_exception('System role not supported') }}{% endif %}\
{{ '[' + message.role.replace('assistant', 'model') + ']' + message.content + '</t>\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '[model]' }}{% endif %}"""


@dataclass(frozen=True)
class Family:
    """An architecture and a tokenizer as the family's have it.

    Attributes:
        config: the architecture.
        options: of its configuration, beside :data:`SIZES`.
        linear: names of the layers that LoRA adapts.
        parameters: names of the stacked experts that it adapts.
        template: the tokenizer's chat template.
        missing: tokens that the tokenizer does not have.
        begins: whether the tokenizer puts its begin token before a text.
        bytes: whether tokens stand for bytes; transformers reads the tokenizer of any qwen2 model so.
    """

    config: type[PreTrainedConfig]
    options: dict[str, Any] = field(default_factory=dict)
    linear: tuple[str, ...] = LINEAR
    parameters: tuple[str, ...] = ()
    template: str | None = None
    missing: tuple[str, ...] = ()
    begins: bool = False
    bytes: bool = False


SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.25,  # so large that every token matters to what follows
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
STACKED = ("gate_up_proj", "down_proj")

FAMILIES = {
    "llama3": Family(LlamaConfig, {"tie_word_embeddings": False}, template=BEGUN, missing=("pad",), begins=True),
    "qwen2": Family(Qwen2Config, {"tie_word_embeddings": True}, template=ROLES, missing=("bos",), bytes=True),
    "qwen3": Family(
        Qwen3Config, {"tie_word_embeddings": True, "head_dim": 8}, template=ROLES, missing=("bos",), bytes=True
    ),
    "gemma2": Family(
        Gemma2Config,
        {
            "tie_word_embeddings": True,
            "head_dim": 8,
            "query_pre_attn_scalar": 8,
            "final_logit_softcapping": 1.5,
            "attn_logit_softcapping": 2.0,
            "sliding_window": 6,
        },
        template=NO_SYSTEM,
        begins=True,
    ),
    "gemma3": Family(
        Gemma3TextConfig,
        {
            "tie_word_embeddings": True,
            "head_dim": 8,
            "query_pre_attn_scalar": 8,
            "sliding_window": 6,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        template=NO_SYSTEM,
        begins=True,
    ),
    "mistral": Family(
        MistralConfig, {"tie_word_embeddings": False, "sliding_window": 6}, missing=("pad",), begins=True
    ),
    "phi": Family(
        PhiConfig,
        {"tie_word_embeddings": False},
        linear=("q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"),
        missing=("pad", "bos"),
    ),
    "phi3": Family(
        Phi3Config,
        {"tie_word_embeddings": False},
        linear=("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
        template=ROLES,
    ),
    "gpt_neox": Family(
        GPTNeoXConfig,
        {"tie_word_embeddings": False},
        linear=("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"),
        missing=("pad",),
    ),
    "olmo2": Family(Olmo2Config, {"tie_word_embeddings": False}, template=ROLES, missing=("bos",), bytes=True),
    "mixtral": Family(
        MixtralConfig,
        {"tie_word_embeddings": False, "num_local_experts": 4, "num_experts_per_tok": 2},
        linear=ATTENTION,
        parameters=STACKED,
        missing=("pad",),
        begins=True,
    ),
    "qwen2_moe": Family(
        Qwen2MoeConfig,
        {"tie_word_embeddings": False, "shared_expert_intermediate_size": 8} | EXPERTS,
        linear=(*LINEAR, "shared_expert_gate"),
        template=ROLES,
        missing=("bos",),
        bytes=True,
    ),
    "qwen3_moe": Family(
        Qwen3MoeConfig,
        {"tie_word_embeddings": False, "head_dim": 8} | EXPERTS,
        linear=ATTENTION,
        parameters=STACKED,
        template=ROLES,
        missing=("bos",),
        bytes=True,
    ),
}


def family_model(name: str, seed: int = 0, **changes: Any) -> Any:
    """A model of a few thousand random parameters, in eval mode; biases and norms are random too."""
    torch.manual_seed(seed)
    family = FAMILIES[name]
    known = family.config()
    sizes = {key: value for key, value in SIZES.items() if hasattr(known, key)}  # GPT-NeoX has no key-value heads
    config = family.config(**sizes | family.options | changes)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model


def family_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """The tiny tokenizer with the family's chat template, and without the tokens that the family lacks."""
    family, tokenizer = FAMILIES[name], tiny_tokenizer()
    if family.bytes:
        vocabulary = {sign.replace(" ", "Ġ").replace("\n", "Ċ"): i for sign, i in tokenizer.get_vocab().items()}
        backend = Tokenizer(models.BPE(vocabulary, merges=[], unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **tokenizer.special_tokens_map)
    if family.begins:
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 1)]
        )
    if family.template is not None:
        tokenizer.add_special_tokens(
            {"additional_special_tokens": ["[system]", "[user]", "[assistant]", "[model]", "</t>"]}
        )
        tokenizer.chat_template = family.template
    for token in family.missing:
        setattr(tokenizer, f"{token}_token", None)
    return tokenizer


def write_family(folder: Path, name: str, seed: int = 0) -> Path:
    """A family's tiny model and tokenizer as a folder that transformers loads."""
    family_model(name, seed).save_pretrained(folder)
    family_tokenizer(name).save_pretrained(folder)
    return folder
