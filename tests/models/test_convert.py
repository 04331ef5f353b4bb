"""Converted checkpoints: the logits of the original mathematics, SentencePiece's ids, and nothing of theirs run."""

from __future__ import annotations

import io
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import linear, silu, softmax
from transformers import AutoModelForCausalLM, AutoTokenizer

import holdfast.models.convert.checkpoint
from holdfast.api.task import Example, Turn
from holdfast.data.encode import Encoder
from holdfast.errors import ConfigError, DataError
from holdfast.models.convert.checkpoint import convert
from holdfast.models.convert.families import find_family
from support import command, fuzz

spm = pytest.importorskip("sentencepiece")

TEXT = [
    *("the sea moves the weed, and the weed holds fast to the stone", "def hold(self):\n        return  self.weed[0]"),
    *(
        "海草 在 潮水 中 保持 它的 位置",
        "one 12 two 345, three 6789; a-b_c (d) e.f! what? Ünder ßo",
        "   spaces   and\ttabs\n",
    ),
] * 6
CHANCE = random.Random(0)
WORDS = ["".join(CHANCE.choice("abdefhilmnorstuw") for _ in range(CHANCE.randrange(2, 7))) for _ in range(300)]
TEXT += [" ".join(CHANCE.sample(WORDS, 8)) for _ in range(200)]
ROPE = {"max_position_embeddings": 64, "rope_theta": 10000.0}
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "vocab_size": 640,
}
INTERNLM2 = {"architectures": ["InternLM2ForCausalLM"], "model_type": "internlm2", "num_key_value_heads": 2}
BAICHUAN2 = {"architectures": ["BaichuanForCausalLM"], "model_type": "baichuan", "z_loss_weight": 0}
BAICHUAN1 = {"architectures": ["BaiChuanForCausalLM"], "model_type": "baichuan"}
COMMON = SMALL | ROPE | {"rms_norm_eps": 1e-5, "torch_dtype": "float32", "tie_word_embeddings": False}
CHATML = (
    "{{ bos_token }}{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + "
    "'<|im_end|>' + '\\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


# --- checkpoints in the families' layouts ---


def internlm2_weights(config: dict[str, Any]) -> dict[str, Tensor]:
    hidden, inner, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    packed = (heads + 2 * config["num_key_value_heads"]) * (hidden // heads)
    shapes = {"model.tok_embeddings.weight": (config["vocab_size"], hidden), "model.norm.weight": (hidden,)}
    if not config["tie_word_embeddings"]:
        shapes["output.weight"] = (config["vocab_size"], hidden)
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        shapes |= {layer + "attention.wqkv.weight": (packed, hidden), layer + "attention.wo.weight": (hidden, hidden)}
        if config["bias"]:
            shapes |= {layer + "attention.wqkv.bias": (packed,), layer + "attention.wo.bias": (hidden,)}
        shapes |= {layer + f"feed_forward.w{n}.weight": (inner, hidden) for n in (1, 3)}
        shapes |= {layer + "feed_forward.w2.weight": (hidden, inner)}
        shapes |= {layer + f"{name}.weight": (hidden,) for name in ("attention_norm", "ffn_norm")}
    return drawn(shapes)


def baichuan_weights(config: dict[str, Any]) -> dict[str, Tensor]:
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    shapes = {f"{name}.weight": (config["vocab_size"], hidden) for name in ("model.embed_tokens", "lm_head")}
    shapes["model.norm.weight"] = (hidden,)
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        shapes |= {
            layer + "self_attn.W_pack.weight": (3 * hidden, hidden),
            layer + "self_attn.o_proj.weight": (hidden, hidden),
            layer + "self_attn.rotary_emb.inv_freq": (hidden // config["num_attention_heads"] // 2,),
            layer + "mlp.gate_proj.weight": (inner, hidden),
            layer + "mlp.up_proj.weight": (inner, hidden),
            layer + "mlp.down_proj.weight": (hidden, inner),
            layer + "input_layernorm.weight": (hidden,),
            layer + "post_attention_layernorm.weight": (hidden,),
        }
    return drawn(shapes)


def drawn(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=generator) * (0.15 if len(shape) > 1 else 1)
        for name, shape in shapes.items()
    }


def write_weights(folder: Path, weights: dict[str, Tensor], kind: str = "safetensors", files: int = 1) -> None:
    """As one file, or as several with an index, with the tensors distributed over them."""
    suffix, single = ("safetensors", "model") if kind == "safetensors" else ("bin", "pytorch_model")
    save = save_file if kind == "safetensors" else torch.save
    if files == 1:
        save(weights, folder / f"{single}.{suffix}")
        return
    names = [f"{single}-{n + 1:05d}-of-{files:05d}.{suffix}" for n in range(files)]
    placed = {name: names[n % files] for n, name in enumerate(weights)}
    for file in names:
        save({name: weights[name] for name in weights if placed[name] == file}, folder / file)
    (folder / f"{single}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": placed}))


def tokenizer_model(**options: Any) -> bytes:
    """A SentencePiece BPE model, trained on a few lines; where nothing is said, without normalisation or prefix."""
    out = io.BytesIO()
    plain = {"normalization_rule_name": "identity", "add_dummy_prefix": False, "remove_extra_whitespaces": False}
    rest = {"split_digits": True, "allow_whitespace_only_pieces": True, "byte_fallback": True, "minloglevel": 2}
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT), model_writer=out, model_type="bpe", num_threads=1,
        **{"vocab_size": 500} | plain | rest | options,
    )  # fmt: skip
    return out.getvalue()


@pytest.fixture(scope="module")
def plain_model() -> bytes:
    return tokenizer_model(control_symbols=["[UNUSED_TOKEN_1]", "[UNUSED_TOKEN_2]"])


@pytest.fixture(scope="module")
def chat_model() -> bytes:
    """With Baichuan 2's tokens for user and assistant at their ids, 195 and 196."""
    fillers = [f"<reserved_x{n}>" for n in range(192)]
    return tokenizer_model(vocab_size=640, user_defined_symbols=[*fillers, "<reserved_106>", "<reserved_107>"])


def write_checkpoint(
    folder: Path, config: dict[str, Any], weights: dict[str, Tensor], tokenizer: bytes, **layout: Any
) -> Path:
    """A folder as the hub has them, with a Python file that must not run."""
    folder.mkdir()
    name = config["model_type"]
    remote = {"AutoConfig": f"configuration_{name}.C", "AutoModelForCausalLM": f"modeling_{name}.M"}
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": remote}))
    for file in (f"configuration_{name}.py", f"modeling_{name}.py", f"tokenization_{name}.py"):
        (folder / file).write_text("raise SystemExit('code of the checkpoint ran')\n")
    (folder / "tokenizer.model").write_bytes(tokenizer)
    settings: dict[str, Any] = {"auto_map": {"AutoTokenizer": [f"tokenization_{name}.T", None]}, "pad_token": "</s>"}
    settings |= {"tokenizer_class": "T", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    if name == "internlm2":
        marks = {"<|im_end|>": 3, "<|im_start|>": 4}  # in place of unused pieces
        flags = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True}
        settings["added_tokens_decoder"] = {str(i): {"content": text} | flags for text, i in marks.items()}
        settings |= {"additional_special_tokens": list(marks), "chat_template": CHATML}
        generation: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": [2, 3], "pad_token_id": 2}
    else:
        token = {"__type": "AddedToken", "lstrip": False, "normalized": True, "rstrip": False, "single_word": True}
        settings |= {"unk_token": token | {"content": "<unk>"}, "pad_token": token | {"content": "<unk>"}}
        settings |= {"add_bos_token": False, "add_eos_token": False}
        generation = {"user_token_id": 195, "assistant_token_id": 196, "eos_token_id": 2, "temperature": 0.3}
        generation |= {"do_sample": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "generation_config.json").write_text(json.dumps(generation))
    write_weights(folder, weights, **layout)
    return folder


# --- the original code's mathematics, on its own weights ---


def reference(config: dict[str, Any], weights: dict[str, Tensor], ids: Tensor) -> Tensor:
    """Logits [batch, seq, vocabulary] of the original models."""
    ours = config["model_type"] == "internlm2"
    x = weights["model.tok_embeddings.weight" if ours else "model.embed_tokens.weight"][ids]
    for i in range(config["num_hidden_layers"]):
        w = {name.removeprefix(f"model.layers.{i}."): tensor for name, tensor in weights.items()}
        y = rms_norm(x, w["attention_norm.weight" if ours else "input_layernorm.weight"], config)
        x = x + (internlm2_attention if ours else baichuan_attention)(y, w, config)
        y = rms_norm(x, w["ffn_norm.weight" if ours else "post_attention_layernorm.weight"], config)
        gate, up, down = (
            w[f"{name}.weight"]
            for name in (
                ("feed_forward.w1", "feed_forward.w3", "feed_forward.w2")
                if ours
                else ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
            )
        )
        x = x + linear(silu(linear(y, gate)) * linear(y, up), down)
    x = rms_norm(x, weights["model.norm.weight"], config)
    if config["tie_word_embeddings"]:
        return linear(x, weights["model.tok_embeddings.weight"])
    head = weights["output.weight" if ours else "lm_head.weight"]
    if config["architectures"] == ["BaichuanForCausalLM"]:  # NormHead
        head = head / head.pow(2).sum(dim=1, keepdim=True).sqrt()
    return linear(x, head)


def rms_norm(x: Tensor, weight: Tensor, config: dict[str, Any]) -> Tensor:
    return weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + config["rms_norm_eps"])


def internlm2_attention(x: Tensor, w: dict[str, Tensor], config: dict[str, Any]) -> Tensor:
    """wqkv: for each key-value head, the heads of its queries, its key, its value."""
    key_value_heads, heads = config["num_key_value_heads"], config["num_attention_heads"]
    per, size = heads // key_value_heads, config["hidden_size"] // heads
    packed = linear(x, w["attention.wqkv.weight"], w.get("attention.wqkv.bias"))
    slots = packed.split(size, dim=-1)
    queries, keys, values = [], [], []
    for group in range(key_value_heads):
        *own, key, value = slots[group * (per + 2) : (group + 1) * (per + 2)]
        queries += own
        keys += [key] * per
        values += [value] * per
    mixed = torch.cat([attend(q, k, v, config) for q, k, v in zip(queries, keys, values, strict=True)], dim=-1)
    return linear(mixed, w["attention.wo.weight"], w.get("attention.wo.bias"))


def baichuan_attention(x: Tensor, w: dict[str, Tensor], config: dict[str, Any]) -> Tensor:
    """W_pack: all queries, all keys, all values."""
    size = config["hidden_size"] // config["num_attention_heads"]
    packed = linear(x, w["self_attn.W_pack.weight"]).unflatten(-1, (3, config["hidden_size"]))
    heads = zip(*(packed[..., part, :].split(size, dim=-1) for part in range(3)), strict=True)
    return linear(torch.cat([attend(q, k, v, config) for q, k, v in heads], dim=-1), w["self_attn.o_proj.weight"])


def attend(query: Tensor, key: Tensor, value: Tensor, config: dict[str, Any]) -> Tensor:
    """Causal attention of one head with rotary positions; tensors are [batch, seq, head size]."""
    length, size = query.shape[1:]
    base, positions, limit = config["rope_theta"], torch.arange(length).float(), config["max_position_embeddings"]
    scaling = config.get("rope_scaling")
    if scaling and scaling["type"] == "linear":
        positions = positions / scaling["factor"]
    if scaling and scaling["type"] == "dynamic" and length > limit:
        base *= (scaling["factor"] * length / limit - (scaling["factor"] - 1)) ** (size / (size - 2))
    angles = positions[:, None] / base ** (torch.arange(0, size, 2).float() / size)

    def turned(x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

    scores = turned(query) @ turned(key).transpose(1, 2) / size**0.5
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    return softmax(scores.masked_fill(future, -torch.inf), dim=-1) @ value


def check_logits(target: Path, config: dict[str, Any], weights: dict[str, Tensor], length: int = 40) -> Any:
    model, info = AutoModelForCausalLM.from_pretrained(target, output_loading_info=True)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    ids = torch.randint(config["vocab_size"], (2, length), generator=torch.Generator().manual_seed(1))
    expected = reference(config, weights, ids)
    assert expected.std() > 0.1
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, expected, atol=1e-5, rtol=1e-5)
    return model


# --- weights ---


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("kind", "files"), [("safetensors", 1), ("safetensors", 2), ("bin", 1), ("bin", 2)])
def test_internlm2(tmp_path, plain_model, kind, files, bias):
    config = COMMON | INTERNLM2 | {"bias": bias}
    weights = internlm2_weights(config)
    source = write_checkpoint(tmp_path / "source", config, weights, plain_model, kind=kind, files=files)
    target = convert(source, tmp_path / "target")
    assert target == tmp_path / "target" and not (tmp_path / "target.partial").exists()
    model = check_logits(target, config, weights)
    assert model.config.attention_bias == bias and model.config.num_key_value_heads == 2
    assert model.generation_config.eos_token_id == [2, 3]
    assert not list(target.glob("*.py")) and "auto_map" not in (target / "config.json").read_text()
    assert "auto_map" not in (target / "tokenizer_config.json").read_text()


@pytest.mark.parametrize("key_value_heads", [1, 8])
@pytest.mark.parametrize("scaling", ["dynamic", "linear"])
def test_internlm2_positions_beyond_the_context(tmp_path, plain_model, scaling, key_value_heads):
    scaled = {"num_key_value_heads": key_value_heads, "rope_scaling": {"type": scaling, "factor": 2.0}}
    config = COMMON | INTERNLM2 | scaled | {"bias": False, "max_position_embeddings": 16, "rope_theta": 1000000}
    weights = internlm2_weights(config)
    convert(write_checkpoint(tmp_path / "source", config, weights, plain_model), tmp_path / "target")
    check_logits(tmp_path / "target", config, weights, length=50)


@pytest.mark.parametrize("stored", [False, True])
def test_tied_embeddings(tmp_path, plain_model, stored):
    config = COMMON | INTERNLM2 | {"bias": True, "tie_word_embeddings": True}
    weights = internlm2_weights(config)
    if stored:
        weights["output.weight"] = weights["model.tok_embeddings.weight"].clone()
    convert(write_checkpoint(tmp_path / "source", config, weights, plain_model), tmp_path / "target")
    model = check_logits(tmp_path / "target", config, weights)
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("family", [BAICHUAN1, BAICHUAN2])
def test_baichuan(tmp_path, chat_model, family):
    config = COMMON | family
    weights = baichuan_weights(config)
    source = write_checkpoint(tmp_path / "source", config, weights, chat_model, kind="bin", files=2)
    model = check_logits(convert(source, tmp_path / "target"), config, weights)
    lengths = model.lm_head.weight.norm(dim=1)
    assert torch.allclose(lengths, torch.ones(640), atol=1e-5) == (family is BAICHUAN2)


def test_weights_keep_their_dtype(tmp_path, chat_model):
    config = COMMON | BAICHUAN2 | {"torch_dtype": "bfloat16"}
    weights = {name: tensor.bfloat16() for name, tensor in baichuan_weights(config).items()}
    convert(write_checkpoint(tmp_path / "source", config, weights, chat_model), tmp_path / "target")
    found = load_file(tmp_path / "target" / "model.safetensors")
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    head = weights["lm_head.weight"].float()
    expected = (head / head.norm(dim=1, keepdim=True)).bfloat16()
    assert torch.equal(found["lm_head.weight"], expected)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "target", dtype="auto").dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_no_more_than_a_file_waits_in_memory(tmp_path, chat_model, monkeypatch, kind):
    import safetensors.torch

    config = COMMON | BAICHUAN2
    weights = baichuan_weights(config)
    source = write_checkpoint(tmp_path / "source", config, weights, chat_model, kind=kind, files=3)
    limit = 640 * 32 * 4  # an embedding
    sizes = []

    def spy(tensors: dict[str, Tensor], *arguments: Any, **keywords: Any) -> None:
        sizes.append(sum(tensor.nbytes for tensor in tensors.values()))
        save_file(tensors, *arguments, **keywords)

    monkeypatch.setattr(safetensors.torch, "save_file", spy)
    monkeypatch.setattr(holdfast.models.convert.checkpoint, "SHARD_BYTES", limit)
    target = convert(source, tmp_path / "target")
    assert len(sizes) > 3 and max(sizes) == limit
    index = json.loads((target / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(sizes)
    files = sorted(path.name for path in target.glob("*.safetensors"))
    assert files == [f"model-{n:05d}-of-{len(sizes):05d}.safetensors" for n in range(1, len(sizes) + 1)]
    for file in files:
        with safe_open(target / file, "pt") as tensors:
            assert all(index["weight_map"][name] == file for name in tensors.keys())  # noqa: SIM118
    check_logits(target, config, weights)


# --- refusals ---


def refused(source: Path, error: type[Exception], *words: str) -> None:
    with pytest.raises(error) as found:
        convert(source, source.parent / "target")
    for word in words:
        assert word in str(found.value), str(found.value)
    assert "\n" not in str(found.value)
    assert sorted(path.name for path in source.parent.iterdir()) == [source.name]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (BAICHUAN2 | {"max_position_embeddings": None}, ["ALiBi", "Llama cannot express", "Baichuan2-7B"]),
        (BAICHUAN2 | {"hidden_size": 5120}, ["ALiBi"]),
        (BAICHUAN1 | {"vocab_size": 125696}, ["BaiChuanForCausalLM", "Baichuan 2", "normalised"]),
        (BAICHUAN2 | {"vocab_size": 64000}, ["BaichuanForCausalLM", "64000", "normalised"]),
        (BAICHUAN2 | {"tie_word_embeddings": True}, ["tie_word_embeddings"]),
        (BAICHUAN2 | {"architectures": None}, ["'baichuan'", "InternLM2.5", "Baichuan2-7B"]),
        ({"architectures": ["ChatGLMModel"], "model_type": "chatglm"}, ["ChatGLMModel", "InternLM2.5", "Baichuan2-7B"]),
        (BAICHUAN2 | {"quantization_config": {"bits": 4}}, ["quantized"]),
        (INTERNLM2 | {"hidden_size": None}, ["hidden_size"]),
        (INTERNLM2 | {"rope_scaling": {"type": "yarn", "factor": 2}}, ["yarn", "dynamic"]),
    ],
)
def test_models_that_are_refused(tmp_path, changes, words):
    source = tmp_path / "source"
    source.mkdir()
    config = {key: value for key, value in (COMMON | changes).items() if value is not None}
    (source / "config.json").write_text(json.dumps(config))
    refused(source, ConfigError, "config.json", *words)


def test_weights_that_are_refused(tmp_path, plain_model):
    config = COMMON | INTERNLM2 | {"bias": False}
    weights = internlm2_weights(config)
    source = write_checkpoint(tmp_path / "source", config, weights, plain_model, files=2)
    wo = "model.layers.1.attention.wo.weight"

    def changed(**changes: Tensor | None) -> None:
        found = {name: tensor for name, tensor in (weights | changes).items() if tensor is not None}
        write_weights(source, found, files=2)

    changed(**{wo: None, "model.norm.weight": None})
    refused(source, DataError, "missing", wo, "model.norm.weight")
    changed(**{"model.layers.2.attention.wo.weight": weights[wo] + 2, "plora.weight": weights[wo] + 1})
    refused(source, DataError, "not known", "model.layers.2.attention.wo.weight", "plora.weight")
    changed(**{wo: torch.zeros(32, 33)})
    refused(source, DataError, wo, "[32, 33]", "[32, 32]")
    changed(**{name.replace("weight", "bias"): torch.zeros(32) for name in weights if name.endswith("wo.weight")})
    refused(source, DataError, "not known", "attention.wo.bias")
    (source / "model-00002-of-00002.safetensors").write_bytes(b"cut")
    refused(source, DataError, "model-00002-of-00002.safetensors", "cannot be read")
    (source / "model-00002-of-00002.safetensors").unlink()
    refused(source, DataError, "model-00002-of-00002.safetensors", "not there")
    (source / "model.safetensors.index.json").unlink()
    refused(source, DataError, "holds no weights")


class Trap:
    def __reduce__(self) -> Any:
        return os.mkdir, ("trapped",)


@pytest.mark.parametrize(("key", "value"), [("num_hidden_layers", 10**20), ("hidden_size", "8"), ("vocab_size", 0)])
def test_sizes_that_no_model_has_are_refused_at_once(key, value):
    with pytest.raises(ConfigError, match=f"config.json: {key}: "):
        find_family(COMMON | INTERNLM2 | {"architectures": ["InternLM2ForCausalLM"], key: value}, Path("source"))


@pytest.mark.parametrize("content", [{"output.weight": Trap()}, {"output.weight": 3}])
def test_pickled_code_does_not_run(tmp_path, monkeypatch, plain_model, content):
    monkeypatch.chdir(tmp_path)
    config = COMMON | INTERNLM2 | {"bias": False}
    source = write_checkpoint(tmp_path / "source", config, content, plain_model, kind="bin")
    refused(source, DataError, "pytorch_model.bin", "cannot be read")


def test_tokenizers_that_are_refused(tmp_path, plain_model):
    config = COMMON | INTERNLM2 | {"bias": False}
    source = write_checkpoint(tmp_path / "source", config, internlm2_weights(config), plain_model)
    settings = json.loads((source / "tokenizer_config.json").read_text())
    for content in (b"version https://git-lfs.github.com/spec/v1\n", plain_model[:-9], plain_model[:9], b""):
        (source / "tokenizer.model").write_bytes(content)
        refused(source, DataError, "tokenizer.model", "is not a SentencePiece model")
    (source / "tokenizer.model").write_bytes(
        tokenizer_model(add_dummy_prefix=True, user_defined_symbols=["<x>", "<y>", "<mark>"])
    )
    refused(source, DataError, "'<mark>'", "space")
    (source / "tokenizer.model").unlink()
    refused(source, DataError, "tokenizer.model", "no such file")
    (source / "tokenizer.model").write_bytes(plain_model)
    (source / "added_tokens.json").write_text(json.dumps({"<new>": 700}))
    refused(source, DataError, "'<new>'", "700", "500")
    (source / "added_tokens.json").write_text(json.dumps({f"<{i}>": i for i in range(500, 641)}))
    refused(source, DataError, "641 tokens", "640")
    (source / "added_tokens.json").unlink()
    (source / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": "<|end|>"}))
    refused(source, DataError, "eos_token '<|end|>'")


def test_whole_or_not_at_all(tmp_path, plain_model, monkeypatch):
    config = COMMON | INTERNLM2 | {"bias": False}
    weights = internlm2_weights(config)
    source = write_checkpoint(tmp_path / "source", config, weights, plain_model)
    target = tmp_path / "target"
    with monkeypatch.context() as patch:
        patch.setattr(
            holdfast.models.convert.checkpoint, "write_json", lambda *_: (_ for _ in ()).throw(OSError("disk full"))
        )
        with pytest.raises(OSError, match="disk full"):
            convert(source, target)
    assert not target.exists()
    convert(source, target)
    check_logits(target, config, weights)
    before = {path.name: path.read_bytes() for path in target.iterdir()}
    with pytest.raises(ConfigError, match="exists already"):
        convert(source, target)
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before
    with pytest.raises(DataError, match="no such file"):
        convert(tmp_path / "nowhere", tmp_path / "other")


# --- tokenizer ---


def probes() -> list[str]:
    """Texts that a tokenizer may stumble over, none of which holds a special token."""
    chance = random.Random(0)
    letters = "abcdefst.,  \n\t12345海草位 é😀ß<>_-"
    drawn = ["".join(chance.choice(letters) for _ in range(chance.randrange(30))) for _ in range(400)]
    odd = [
        "",
        " ",
        "   ",
        " a",
        "a ",
        "  a  b  ",
        "\n",
        "\n\n a",
        "ﬁ①Å",
        "<0x41>",
        "\x00",
        "a\u3000b",
        "e\u0301",
        "▁a ▁▁ b▁",
    ]
    return [*TEXT[:5], *drawn, *odd]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"user_defined_symbols": ["<mark>", "▁▁▁▁", "▁▁"]},
        {"add_dummy_prefix": True},
        {"add_dummy_prefix": True, "remove_extra_whitespaces": True, "normalization_rule_name": "nmt_nfkc"},
        {"remove_extra_whitespaces": True},
        {"byte_fallback": False},
    ],
)
def test_ids_are_those_of_sentencepiece(tmp_path, options):
    model = tokenizer_model(vocab_size=500 if options.get("byte_fallback", True) else 250, **options)
    config = COMMON | BAICHUAN1 | {"num_hidden_layers": 1}
    source = write_checkpoint(tmp_path / "source", config, baichuan_weights(config), model)
    (source / "generation_config.json").unlink()
    tokenizer = AutoTokenizer.from_pretrained(convert(source, tmp_path / "target"))
    original = spm.SentencePieceProcessor(model_proto=model)
    texts = [*probes(), "a<mark>b <mark>", "<mark>    x"]
    for text in texts:
        ids = original.encode(text)
        assert tokenizer(text)["input_ids"] == ids, text
        if "▁" not in text:
            assert tokenizer.decode(ids, skip_special_tokens=False) == original.decode(ids).replace(" ⁇ ", "<unk>")
    if not options:
        assert all(tokenizer.decode(tokenizer(text)["input_ids"]) == text.replace("▁", " ") for text in texts)


def test_internlm2_tokenizer(tmp_path, plain_model):
    config = COMMON | INTERNLM2 | {"bias": False, "num_hidden_layers": 1}
    source = write_checkpoint(tmp_path / "source", config, internlm2_weights(config), plain_model)
    (source / "added_tokens.json").write_text(json.dumps({"<|extra|>": 500}))
    tokenizer = AutoTokenizer.from_pretrained(convert(source, tmp_path / "target"))
    original = spm.SentencePieceProcessor(model_proto=plain_model)
    assert tokenizer.is_fast and len(tokenizer) == 501
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id) == (
        1,
        2,
        2,
        0,
    )
    messages = [{"role": "user", "content": " hold fast?\n"}, {"role": "assistant", "content": "The weed 草."}]
    text = "<s><|im_start|>user\n hold fast?\n<|im_end|>\n<|im_start|>assistant\nThe weed 草.<|im_end|>\n"
    assert tokenizer.apply_chat_template(messages, tokenize=False) == text
    prompt = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    assert prompt == "<s><|im_start|>user\n hold fast?\n<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
    parts = [[1, 4], "user\n hold fast?\n", [3], "\n", [4], "assistant\nThe weed 草.", [3], "\n"]
    assert ids == [i for part in parts for i in (original.encode(part) if isinstance(part, str) else part)]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "user\n hold fast?\n\nassistant\nThe weed 草.\n"
    assert tokenizer("a<|extra|> b")["input_ids"] == [1, *original.encode("a"), 500, *original.encode(" b")]


def test_baichuan2_tokenizer(tmp_path, chat_model):
    config = COMMON | BAICHUAN2 | {"num_hidden_layers": 1}
    source = write_checkpoint(tmp_path / "source", config, baichuan_weights(config), chat_model)
    target = convert(source, tmp_path / "target")
    assert json.loads((target / "generation_config.json").read_text()) == {
        "eos_token_id": 2, "temperature": 0.3, "do_sample": True,
    }  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(target)
    original = spm.SentencePieceProcessor(model_proto=chat_model)
    assert tokenizer.convert_tokens_to_ids(["<reserved_106>", "<reserved_107>"]) == [195, 196]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 0)
    messages = [{"role": role, "content": f" {role} 海草?\n"} for role in ("system", "user", "assistant", "user")]
    text = " system 海草?\n<reserved_106> user 海草?\n<reserved_107> assistant 海草?\n<reserved_106> user 海草?\n"
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert rendered == text + "<reserved_107>"
    assert tokenizer.apply_chat_template(messages, tokenize=False) == text
    assert tokenizer.apply_chat_template(messages[1:3], tokenize=False) == (
        "<reserved_106> user 海草?\n<reserved_107> assistant 海草?\n</s>"
    )
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    says = [original.encode(message["content"]) for message in messages]
    assert ids == [*says[0], 195, *says[1], 196, *says[2], 195, *says[3], 196]  # as build_chat_input joins them
    with pytest.raises(Exception, match="roles are user and assistant"):
        tokenizer.apply_chat_template([*messages, messages[0]], tokenize=False)

    encoder = Encoder(tokenizer, max_length=64)
    example = Example("f", 0, (Turn("user", "hold?"), Turn("assistant", "fast")))
    assert encoder.prompt(example, reserve=1) == [195, *original.encode("hold?"), 196]
    [row] = encoder.encode(example)
    assert [label for label in row["labels"] if label >= 0] == [*original.encode("fast"), 2]
    assert encoder.stop_ids == [2]


def test_base_models_get_no_chat_template(tmp_path, chat_model):
    config = COMMON | BAICHUAN2 | {"num_hidden_layers": 1}
    source = write_checkpoint(tmp_path / "source", config, baichuan_weights(config), chat_model)
    (source / "generation_config.json").write_text("{}")
    settings = json.loads((source / "tokenizer_config.json").read_text())
    (source / "tokenizer_config.json").write_text(json.dumps(settings | {"pad_token": "<pad>"}))  # as Baichuan-7B does
    tokenizer = AutoTokenizer.from_pretrained(convert(source, tmp_path / "target"))
    assert tokenizer.chat_template is None and tokenizer.pad_token is None and len(tokenizer) == 640


# --- the command ---

USE = """
import sys
sys.modules["sentencepiece"] = sys.modules["google"] = sys.modules["google.protobuf"] = None
from holdfast.cli import main
sys.argv = ["holdfast", "convert", *sys.argv[1:]]
try:
    main()
except SystemExit as end:
    if end.code:
        raise
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[-1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[-1])
prompt = tokenizer.apply_chat_template(
    [{"role": "user", "content": "hold"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
)
tokens = model.generate(**prompt, max_new_tokens=5, min_new_tokens=5, do_sample=False)
print(tokens.shape[1] - prompt["input_ids"].shape[1])
"""


def test_command_needs_no_other_package(tmp_path, plain_model, capsys):
    config = COMMON | INTERNLM2 | {"bias": False}
    source = write_checkpoint(tmp_path / "source", config, internlm2_weights(config), plain_model, files=2)
    target = tmp_path / "target"
    use = [sys.executable, "-c", USE, str(source), str(target)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(use, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [str(target), "5"]
    assert command.holdfast("convert", source, target) == 2
    assert "exists already" in capsys.readouterr().err


@pytest.mark.parametrize("count", [15, pytest.param(200, marks=pytest.mark.slow)])
def test_damaged_checkpoints_are_refused_in_one_message(count, tmp_path, plain_model):
    config = COMMON | INTERNLM2 | {"bias": False}
    source = write_checkpoint(tmp_path / "source", config, internlm2_weights(config), plain_model)
    cases = random.Random(count).sample(fuzz.broken_conversion_cases(source, count, 40), count)
    for number, case in enumerate(cases):
        (tmp_path / str(number)).mkdir()
        said = fuzz.fault(case, tmp_path / str(number))
        assert said is None, said
