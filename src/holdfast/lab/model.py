"""The model of a laboratory run: new or loaded, and saved with a note that makes its first weights again."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from holdfast.config.model import ModelConfig
from holdfast.data.tokens.file import TokenFile
from holdfast.engines.pieces import prepare_loaded
from holdfast.engines.profiles import loading_options
from holdfast.engines.unused import leave_deepspeed_unimported
from holdfast.engines.whole import fingerprint
from holdfast.errors import ConfigError, RunDirectoryError
from holdfast.lab.architecture import architecture, new_model
from holdfast.lab.config import LabConfig, SizeConfig
from holdfast.lab.measure import Weights, weights_of
from holdfast.lab.shapes import Note
from holdfast.models.attention import fastest
from holdfast.models.pretrained import load_tokenizer, readable
from holdfast.models.weights import load_language_model
from holdfast.records.directory import RunDirectory
from holdfast.records.shapes import checked
from holdfast.system.files import read_json, write_json

NOTE = "lab.json"


def tokenizer_of(config: LabConfig, file: TokenFile) -> PreTrainedTokenizerBase:
    """The tokenizer of the model to go on from; for a new model, that of the text."""
    if config.model.path is None:
        return file.tokenizer()
    return load_tokenizer(ModelConfig(name=config.model.path))


def make_model(
    config: LabConfig, tokenizer: PreTrainedTokenizerBase, directory: RunDirectory
) -> tuple[Any, Weights, Weights | None]:
    """Make a new model, or load the one to go on from.

    Args:
        directory: of the run; a new model that an engine divides among processes is written there for a moment.

    Returns:
        the model; its weights; and the weights that its first training began with, None where they are unknown (the
        note of a laboratory model has the size and seed that make them again).

    Raises:
        ConfigError: the model cannot be loaded, or reads fewer tokens than a sequence has.
    """
    leave_deepspeed_unimported()
    size = config.model
    attention = size.attention or fastest(config.training.precision)
    options: dict[str, Any] = {"attn_implementation": attention} if attention else {}
    options |= loading_options(config.training.engine)
    if size.path is None:
        model = new_model(size, tokenizer, config.context, config.seed, attention)
        start = weights_of(model)
        return _divided(model, options, directory), start, start
    model = load_language_model(size.path, key="model.path", dtype="float32", **options)
    reads = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if reads is not None and reads < config.context:
        raise ConfigError(f"context: {config.context} is more than the {reads} tokens that {size.path!r} reads")
    prepare_loaded(model)
    return model, weights_of(model), initial_weights(Path(size.path), tokenizer, model.config)


def _divided(model: Any, options: dict[str, Any], directory: RunDirectory) -> Any:
    """A new model, divided among the processes where its engine does that."""
    if "distributed_config" not in options:
        return model
    folder = directory.path / "begin.partial"
    if directory.process.main:
        model.save_pretrained(folder)
    directory.process.wait()
    divided = load_language_model(folder, dtype="float32", **options)
    prepare_loaded(divided)
    directory.process.wait()
    if directory.process.main:
        shutil.rmtree(folder)
    return divided


def initial_weights(folder: Path, tokenizer: PreTrainedTokenizerBase, config: Any) -> Weights | None:
    """The first weights of a laboratory model; None for another model, or where this machine makes different ones.

    Args:
        config: the model's, in transformers.

    Raises:
        RunDirectoryError: the note is damaged, or of a model of another size.
    """
    path = folder / NOTE
    begin = _read_note(path)["begin"] if path.exists() else None
    if begin is None:
        return None
    with readable(f"{path}: is damaged", RunDirectoryError):
        size = SizeConfig(**begin["size"])
        first = architecture(size, len(tokenizer), begin["context"])
        for key in ("hidden_size", "num_hidden_layers", "intermediate_size", "max_position_embeddings"):
            if getattr(first, key) != getattr(config, key, None):
                raise ValueError(f"begin.size: {key} is not that of the model")
    made = weights_of(new_model(size, tokenizer, begin["context"], begin["seed"]))
    return made if fingerprint(made.items()) == begin["weights"] else None


def _read_note(path: Path) -> dict[str, Any]:
    note: dict[str, Any] = checked(path, Note, read_json(path))
    return note


def write_note(folder: Path, config: LabConfig, init: Weights | None, tokens: int) -> None:
    """Note in a saved model's folder how its first weights are made, and on how many tokens it was trained in all."""
    before = Path(config.model.path, NOTE) if config.model.path else None
    if before is None:
        assert init is not None
        size = config.model.model_dump(exclude_none=True)
        begin = {"size": size, "context": config.context, "seed": config.seed, "weights": fingerprint(init.items())}
        note: dict[str, Any] = {"begin": begin, "tokens": tokens}
    elif before.exists():
        note = _read_note(before)
        note["tokens"] += tokens
    else:
        note = {"begin": None, "tokens": tokens}
    write_json(folder / NOTE, note)
