"""A GGUF file, as llama.cpp and Ollama use it, as a plain folder that transformers trains and saves.

transformers reads the file; quantised weights are computed back (dequantised) into float32. Without that they would
stay packed, and could be neither trained nor saved. What quantisation lost stays lost.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from holdfast.errors import ConfigError, DataError
from holdfast.models.pretrained import check_tokenizer, readable
from holdfast.models.weights import load_causal_lm
from holdfast.system.files import whole_folder
from holdfast.system.manifest import file_facts

MAGIC = b"GGUF"


def convert_gguf(source: Path, target: Path) -> Path:
    """Write a GGUF file's model, tokenizer and chat template as a folder of safetensors in float32.

    ``config.json`` says where the weights come from, under ``converted_from``: the file's name, its SHA-256, and the
    share of its weights of each type.

    Args:
        source: one file that holds a whole causal language model.
        target: a folder that does not exist yet; it is written whole or not at all.

    Returns:
        the target.

    Raises:
        ConfigError: the target exists, the package ``gguf`` is missing, or the model is none that transformers reads.
        DataError: the file is damaged.
    """
    if target.exists():
        raise ConfigError(f"{target}: exists already; name a folder that does not")
    types = _types(source)
    import torch
    from transformers import AutoTokenizer, GgufConfig

    place: dict[str, Any] = {"gguf_file": source.name}
    with readable(f"{source}: its tokenizer cannot be read", DataError):
        tokenizer = AutoTokenizer.from_pretrained(source.parent, **place)
        check_tokenizer(tokenizer)
    model = load_causal_lm(
        source.parent, key=str(source), quantization_config=GgufConfig(dequantize=True), dtype=torch.float32, **place
    )
    model.config.converted_from = {"file": source.name, "sha256": file_facts(source)["sha256"], "weights": types}
    with readable(f"{source}: cannot be converted", DataError, passing=(OSError,)), whole_folder(target) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return target


def _types(source: Path) -> dict[str, float]:
    """The share of a file's weights of each type, the most frequent first.

    Raises:
        ConfigError: as :func:`convert_gguf`.
        DataError: the file is damaged, or another one.
    """
    try:
        from gguf import GGUFReader
    except ImportError:
        raise ConfigError("GGUF files are read with the package gguf: pip install 'holdfast[gguf]'") from None
    with source.open("rb") as file:
        begins = file.read(len(MAGIC))
    if begins != MAGIC:
        raise DataError(f"{source}: is no GGUF file, whose first bytes are {MAGIC.decode()}")
    counts: Counter[str] = Counter()
    with readable(f"{source}: is no whole GGUF file; download it again", DataError):
        for tensor in GGUFReader(source).tensors:
            counts[tensor.tensor_type.name] += int(tensor.n_elements)
    if not counts:
        raise DataError(f"{source}: holds no weights")
    return {name: round(count / counts.total(), 4) for name, count in counts.most_common()}
