"""A GGUF file becomes the folder that it was made of; what is none, or damaged, is one message."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from holdfast import run
from holdfast.config.model import ModelConfig
from holdfast.deploy.export import export
from holdfast.errors import ConfigError, DataError, RunDirectoryError
from holdfast.models.convert.gguf import convert_gguf
from holdfast.models.gguf import weight_types
from holdfast.models.pretrained import load_model_config
from holdfast.runner.evaluate import evaluate
from holdfast.system.files import read_json
from holdfast.system.progress import Progress
from support.command import holdfast
from support.tiny import tiny_config, tiny_model

gguf = pytest.importorskip("gguf", reason="needs gguf: pip install 'holdfast[gguf]'")

TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{{ eos_token }}{% endfor %}"
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
WHOLE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}


def write(path: Path, kind: Any = None, leave_out: str = "") -> Any:
    """A GGUF file of a tiny Llama, as llama.cpp writes one; the model."""
    tokens = ["<unk>", "<s>", "</s>", *(chr(97 + i) for i in range(26)), *(f"{chr(97 + i)}b" for i in range(20))]
    model = tiny_model(vocab_size=len(tokens), bos_token_id=1, eos_token_id=2, **SIZES)
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
    writer.add_token_merges([f"{chr(97 + i)} b" for i in range(20)])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(TEMPLATE)
    names = dict(WHOLE) | {
        f"blk.{layer}.{short}": f"model.layers.{layer}.{long}"
        for layer in range(config.num_hidden_layers)
        for short, long in LAYER.items()
    }
    weights = model.state_dict()
    for short, long in names.items():
        tensor = weights[f"{long}.weight"]
        heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(short.split(".")[-1])
        if heads:  # llama.cpp rotates neighbours, transformers the halves
            tensor = tensor.view(heads, 2, -1, tensor.shape[1]).swapaxes(1, 2).reshape(tensor.shape)
        array = tensor.contiguous().numpy()
        if short != leave_out and (kind is None or array.ndim == 1):
            writer.add_tensor(f"{short}.weight", array)
        elif short != leave_out:
            writer.add_tensor(f"{short}.weight", gguf.quants.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def far(model: Any, folder: Path) -> float:
    """How far the logits of a converted folder lie from a model's, beside their size."""
    ids = torch.arange(3, 30)[None]
    with torch.no_grad():
        found, wanted = AutoModelForCausalLM.from_pretrained(folder)(ids).logits, model(ids).logits
    return float((found - wanted).norm() / wanted.norm())


def test_it_is_the_model_that_the_file_was_made_of(tmp_path):
    model = write(tmp_path / "plain.gguf")
    assert holdfast("convert", tmp_path / "plain.gguf", tmp_path / "folder") == 0
    assert far(model, tmp_path / "folder") < 1e-5
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "folder")
    assert tokenizer("abc")["input_ids"] == [29, 5] and tokenizer.chat_template == TEMPLATE
    said = json.loads((tmp_path / "folder" / "config.json").read_text())
    assert said["converted_from"]["file"] == "plain.gguf" and said["converted_from"]["weights"] == {"F32": 1.0}
    assert "quantization_config" not in said


def test_quantised_weights_are_computed_back_and_said(tmp_path):
    model = write(tmp_path / "small.gguf", gguf.GGMLQuantizationType.Q8_0)
    convert_gguf(tmp_path / "small.gguf", tmp_path / "folder")
    assert 1e-5 < far(model, tmp_path / "folder") < 0.05
    types = json.loads((tmp_path / "folder" / "config.json").read_text())["converted_from"]["weights"]
    assert types["Q8_0"] > 0.9 and set(types) == {"Q8_0", "F32"} and sum(types.values()) == pytest.approx(1, abs=1e-3)


def test_a_file_that_was_replaced_is_read_anew(tmp_path):
    file = tmp_path / "model.gguf"
    write(file)
    assert weight_types(file) == {"F32": 1.0}
    write(file, gguf.GGMLQuantizationType.Q8_0)
    assert "Q8_0" in weight_types(file)
    loaded = [load_model_config(ModelConfig(name=str(file))) for _ in range(2)]
    loaded[0].hidden_size = 1
    assert loaded[1].hidden_size == SIZES["hidden_size"], "each caller has its own"


def test_what_cannot_be_converted_is_one_message(tmp_path):
    write(tmp_path / "whole.gguf")
    content = (tmp_path / "whole.gguf").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(content[: len(content) // 2])
    (tmp_path / "head.gguf").write_bytes(content[:100])
    (tmp_path / "other.gguf").write_bytes(b"not a model at all")
    for name in ("cut", "head"):
        with pytest.raises(DataError, match=rf"{name}\.gguf: is no whole GGUF file; download it again$"):
            convert_gguf(tmp_path / f"{name}.gguf", tmp_path / "folder")
    with pytest.raises(DataError, match=r"other\.gguf: is no GGUF file, whose first bytes are GGUF"):
        convert_gguf(tmp_path / "other.gguf", tmp_path / "folder")
    write(tmp_path / "lacks.gguf", leave_out="blk.1.ffn_up")
    with pytest.raises(ConfigError, match=r"lacks\.gguf.*lack 1 tensors .*model\.layers\.1\.mlp\.up_proj\.weight"):
        convert_gguf(tmp_path / "lacks.gguf", tmp_path / "folder")
    assert not (tmp_path / "folder").exists()
    with pytest.raises(ConfigError, match="exists already"):
        convert_gguf(tmp_path / "whole.gguf", tmp_path)


def test_a_run_takes_the_file_as_its_model_and_is_that_of_the_converted_folder(tmp_path):
    write(tmp_path / "small.gguf", gguf.GGMLQuantizationType.Q8_0)
    convert_gguf(tmp_path / "small.gguf", tmp_path / "folder")
    runs = {}
    for model in ("small.gguf", "folder"):
        config = tiny_config(tmp_path, model=str(tmp_path / model), tuner="lora", output=str(tmp_path / f"run-{model}"))
        config["stream"]["order"], config["training"] = ["red"], {"max_steps": 2}
        for _ in range(2):  # the second time it is finished
            runs[model] = run(config, Progress(quiet=True))
    assert runs["small.gguf"]["scores"] == runs["folder"]["scores"]
    ours = tmp_path / "run-small.gguf"
    stages = [read_json(tmp_path / f"run-{model}" / "stages" / "01-red" / "stage.json") for model in runs]
    assert stages[0]["weights"] == stages[1]["weights"]
    assert "small.gguf (100% Q8_0" in read_json(ours / "run.json")["converted_from"]
    assert "small.gguf (100% Q8_0" in (ours / "report.html").read_text()
    with pytest.raises(ConfigError, match="--merge: PEFT loads no adapter onto a GGUF file"):
        export(ours, tmp_path / "adapter")
    export(ours, tmp_path / "merged", merge=True)
    assert "small.gguf (100% Q8_0" in (tmp_path / "merged" / "README.md").read_text()
    evaluate(ours)
    (tmp_path / "small.gguf").write_bytes(b"GGUF" + b"x" * 500)
    with pytest.raises(RunDirectoryError, match=r"changed since this run began:\n  model: weights and tokenizer"):
        export(ours, tmp_path / "again", merge=True)
