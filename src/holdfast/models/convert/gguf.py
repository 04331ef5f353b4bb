"""A GGUF file as a plain folder that transformers loads, trains and saves."""

from __future__ import annotations

from pathlib import Path

from holdfast.errors import ConfigError, DataError
from holdfast.models.gguf import located, weight_types
from holdfast.models.pretrained import check_tokenizer, readable
from holdfast.models.weights import load_language_model
from holdfast.system.files import whole_folder


def convert_gguf(source: Path, target: Path) -> Path:
    """Write a GGUF file's model, tokenizer and chat template as a folder of safetensors in float32.

    ``config.json`` says where the weights come from (:func:`.load_language_model`).

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
    import torch
    from transformers import AutoTokenizer

    weight_types(source)
    if source.suffix.lower() != ".gguf":
        raise ConfigError(f"{source}: is a GGUF file that is not called so; let its name end with .gguf")
    folder, place = located(source)
    with readable(f"{source}: its tokenizer cannot be read", DataError):
        tokenizer = AutoTokenizer.from_pretrained(folder, **place)
        check_tokenizer(tokenizer)
    model = load_language_model(source, key="FILE", dtype=torch.float32)
    with readable(f"{source}: cannot be converted", DataError, passing=(OSError,)), whole_folder(target) as written:
        model.save_pretrained(written)
        tokenizer.save_pretrained(written)
    return target
