"""The model families that can be converted: how their tensors and settings map to Llama's."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from holdfast.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor


CONVERTIBLE = "InternLM2, InternLM2.5, Baichuan2-7B and Baichuan-7B can be converted"
DERIVED = re.compile(r"rotary_emb\.inv_freq$")  # a buffer that older code saved; it follows from the configuration
VOCABULARY = {"Baichuan": 64000, "Baichuan 2": 125696}  # rows of the published models


@dataclass(frozen=True)
class Part:
    """One tensor of a source: its shape, the names of its parts in Llama, and how it is split."""

    shape: tuple[int, ...]
    targets: tuple[str, ...]
    split: Callable[[Tensor], Sequence[Tensor]] = lambda tensor: [tensor]


# --- the families ---


def find_family(config: dict[str, Any], source: Path) -> tuple[dict[str, Part], Any]:
    """The tensors that a source must hold, by name, and the configuration of the resulting Llama."""
    where = source / "config.json"
    architecture = next(iter(config.get("architectures") or []), None)
    kind = config.get("model_type")
    if config.get("quantization_config"):
        raise ConfigError(f"{where}: the weights are quantized; only a checkpoint with whole weights can be converted")
    if architecture == "InternLM2ForCausalLM" or (architecture is None and kind == "internlm2"):
        _require(config, where)
        return _internlm2(config), _llama(config, bias=config.get("bias", True), where=where)
    if architecture in ("BaichuanForCausalLM", "BaiChuanForCausalLM"):
        _require(config, where)
        return _baichuan(config, norm_head=_has_norm_head(config, architecture, where)), _llama(config, where=where)
    raise ConfigError(
        f"{where}: a model with architectures {architecture!r} and model_type {kind!r} cannot be converted; "
        f"{CONVERTIBLE}"
    )


MOST_LAYERS = 10_000
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


def _require(config: dict[str, Any], where: Path) -> None:
    missing = [key for key in SIZES if key not in config]
    if missing:
        raise ConfigError(f"{where}: does not say {', '.join(missing)}")
    for key in SIZES:
        if type(config[key]) is not int or not 0 < config[key] < 2**31:
            raise ConfigError(f"{where}: {key}: must be a whole number above 0, not {config[key]!r:.60}")
    if config["num_hidden_layers"] > MOST_LAYERS:
        raise ConfigError(f"{where}: num_hidden_layers: {config['num_hidden_layers']} are more than {MOST_LAYERS:,}")


def _has_norm_head(config: dict[str, Any], architecture: str, where: Path) -> bool:
    """Whether the head is normalised, as in Baichuan 2, or plain, as in Baichuan 1.

    Both call their model type baichuan. The 7B of the first spells its class BaiChuan, all others spell it Baichuan.
    The 13B, which have another width or no context length in their configuration, have no rotary positions.

    Raises:
        ConfigError: it is a 13B; or the vocabulary is that of the other generation.
    """
    if "max_position_embeddings" not in config or config["hidden_size"] == 5120:
        raise ConfigError(
            f"{where}: Baichuan-13B and Baichuan2-13B place tokens by ALiBi (linear biases on attention), which Llama "
            f"cannot express; {CONVERTIBLE}"
        )
    name, other = ("Baichuan", "Baichuan 2") if architecture == "BaiChuanForCausalLM" else ("Baichuan 2", "Baichuan")
    if config["vocab_size"] == VOCABULARY[other]:
        raise ConfigError(
            f"{where}: architectures is {architecture!r}, as in {name}, but vocab_size {VOCABULARY[other]} is that of "
            f"{other}; whether the head is to be normalised cannot be told"
        )
    if name == "Baichuan 2" and config.get("tie_word_embeddings"):
        raise ConfigError(f"{where}: tie_word_embeddings is true, but a normalised head cannot share the embeddings")
    return name == "Baichuan 2"


def _internlm2(config: dict[str, Any]) -> dict[str, Part]:
    """InternLM2's tensors: w1, w3 and w2 are gate, up and down; wqkv holds a key-value head's group after another."""
    hidden, inner, heads = (config[key] for key in ("hidden_size", "intermediate_size", "num_attention_heads"))
    key_value_heads = config.get("num_key_value_heads") or heads
    packed = (heads + 2 * key_value_heads) * (hidden // heads)
    ungroup = partial(_ungroup, key_value_heads=key_value_heads, groups=heads // key_value_heads)
    parts = _outside(config, embedding="model.tok_embeddings.weight", head="output.weight")
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        for kind, rest in [("weight", (hidden,)), ("bias", ())][: 1 + bool(config.get("bias", True))]:
            projections = tuple(f"{layer}self_attn.{letter}_proj.{kind}" for letter in "qkv")
            parts[f"{layer}attention.wqkv.{kind}"] = Part((packed, *rest), projections, ungroup)
            parts[f"{layer}attention.wo.{kind}"] = Part((hidden, *rest), (f"{layer}self_attn.o_proj.{kind}",))
        parts |= {
            f"{layer}feed_forward.w1.weight": Part((inner, hidden), (f"{layer}mlp.gate_proj.weight",)),
            f"{layer}feed_forward.w3.weight": Part((inner, hidden), (f"{layer}mlp.up_proj.weight",)),
            f"{layer}feed_forward.w2.weight": Part((hidden, inner), (f"{layer}mlp.down_proj.weight",)),
            f"{layer}attention_norm.weight": Part((hidden,), (f"{layer}input_layernorm.weight",)),
            f"{layer}ffn_norm.weight": Part((hidden,), (f"{layer}post_attention_layernorm.weight",)),
        }
    return parts


def _baichuan(config: dict[str, Any], norm_head: bool) -> dict[str, Part]:
    """Baichuan's tensors: Llama's names, but for W_pack, which holds query, key and value one below the other."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    parts = _outside(config, embedding="model.embed_tokens.weight", head="lm_head.weight")
    if norm_head:
        parts["lm_head.weight"] = Part((config["vocab_size"], hidden), ("lm_head.weight",), _normalise_rows)
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        projections = tuple(f"{layer}self_attn.{letter}_proj.weight" for letter in "qkv")
        parts[f"{layer}self_attn.W_pack.weight"] = Part((3 * hidden, hidden), projections, lambda w: w.chunk(3))
        shapes: dict[str, tuple[int, ...]] = {
            "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
            "input_layernorm": (hidden,),
            "post_attention_layernorm": (hidden,),
        }
        parts |= {f"{layer}{name}.weight": Part(shape, (f"{layer}{name}.weight",)) for name, shape in shapes.items()}
    return parts


def _outside(config: dict[str, Any], embedding: str, head: str) -> dict[str, Part]:
    """The tensors outside the blocks; a stored head that is tied to the embedding is left out."""
    shape = (config["vocab_size"], config["hidden_size"])
    return {
        embedding: Part(shape, ("model.embed_tokens.weight",)),
        "model.norm.weight": Part(shape[1:], ("model.norm.weight",)),
        head: Part(shape, () if config.get("tie_word_embeddings") else ("lm_head.weight",)),
    }


def _ungroup(packed: Tensor, key_value_heads: int, groups: int) -> Sequence[Tensor]:
    """Query, key and value of wqkv: for each key-value head its query heads, its key, its value.

    Args:
        packed: [key-value heads * (groups + 2) * head size, ...].
    """
    heads = packed.reshape(key_value_heads, groups + 2, -1, *packed.shape[1:])
    return [part.reshape(-1, *packed.shape[1:]) for part in (heads[:, :groups], heads[:, groups], heads[:, groups + 1])]


def _normalise_rows(weight: Tensor) -> Sequence[Tensor]:
    """NormHead: rows of length one. Computed in float32, some rows at a time, and stored in the weight's dtype."""
    import torch
    from torch.nn.functional import normalize

    return [torch.cat([normalize(rows.float()).to(weight.dtype) for rows in weight.split(8192)])]


def _llama(config: dict[str, Any], where: Path, bias: bool = False) -> Any:
    """The configuration as a LlamaConfig; absent keys have the defaults of the families' own configurations."""
    from transformers import LlamaConfig

    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": float(config.get("rope_theta", 10000.0))}
    scaling = config.get("rope_scaling")
    if scaling:
        rope |= {"rope_type": scaling.get("type", scaling.get("rope_type")), "factor": float(scaling["factor"])}
        if rope["rope_type"] not in ("linear", "dynamic"):
            raise ConfigError(f"{where}: rope_scaling.type is {rope['rope_type']!r}; linear and dynamic are known")
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        **{key: config[key] for key in SIZES},
        num_key_value_heads=config.get("num_key_value_heads") or config["num_attention_heads"],
        hidden_act=config.get("hidden_act", "silu"),
        max_position_embeddings=config.get("max_position_embeddings", 2048),
        initializer_range=config.get("initializer_range", 0.02),
        rms_norm_eps=config.get("rms_norm_eps", 1e-6),
        rope_parameters=rope,
        attention_bias=bool(bias),
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        pad_token_id=config.get("pad_token_id", 0),
        bos_token_id=config.get("bos_token_id", 1),
        eos_token_id=config.get("eos_token_id", 2),
        dtype=config.get("torch_dtype", config.get("dtype")),
    )
