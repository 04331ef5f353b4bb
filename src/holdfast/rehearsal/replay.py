"""Let a model on disk write a corpus of its own samples, to be rehearsed later."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from holdfast.config.model import ModelConfig
from holdfast.engines.whole import model_fingerprint
from holdfast.errors import ConfigError, did_you_mean
from holdfast.models.head import begin_token, context
from holdfast.models.kinds import is_seq2seq
from holdfast.models.pretrained import load_model_config, load_tokenizer
from holdfast.models.sampling import Sampler, sample
from holdfast.models.seq2seq import TASK_TYPES
from holdfast.models.vllm_engine import ADAPTER, vllm_engine
from holdfast.models.weights import check_weights, load_language_model, whole_adapter
from holdfast.rehearsal.corpus import Drawing, write_corpus
from holdfast.rehearsal.request import PLAIN, Request, SampleOptions
from holdfast.system.device import device_type
from holdfast.system.files import read_json
from holdfast.system.manifest import check_weights_files

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

ENGINES = ("transformers", "vllm")


def replay(
    model: str,
    out: str | Path,
    options: SampleOptions = PLAIN,
    *,
    tokens: int,
    batch_size: int = 64,
    seed: int = 0,
    engine: str = "transformers",
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Let a model write a corpus of itself; the same call continues one that was stopped.

    Args:
        model: folder or hub name of a model, or folder of an adapter, with its tokenizer.
        out, tokens, batch_size, seed, on_progress: as :func:`holdfast.rehearsal.corpus.write_corpus` takes them.
        options: how samples begin, how long they are, and how they are drawn.
        engine: transformers or vllm.

    Returns:
        the manifest.

    Raises:
        ConfigError: the model cannot be loaded or cannot write such samples; the engine is unknown or not installed.
        RunDirectoryError: the model is of a run or an export, and a file is damaged.
        UserError: as write_corpus.
    """
    if engine not in ENGINES:
        raise ConfigError(f"engine: there is no engine {engine!r}{did_you_mean(engine, ENGINES)}")
    tokenizer = load_tokenizer(ModelConfig(name=model), key="MODEL")
    check_weights_files(Path(model))
    if _answers(Path(model)):
        raise ConfigError(
            f"MODEL: {model!r} is a sequence-to-sequence model, which answers prompts and writes no texts of itself; "
            "rehearsal draws its samples while it trains (self_replay and kl_replay without a path)"
        )
    draw: Sampler
    fingerprint = None
    if engine == "vllm":
        config = load_model_config(ModelConfig(name=model)).get_text_config()
        reads, begin = (getattr(config, key, None) for key in ("max_position_embeddings", "bos_token_id"))
        request = Request.of(tokenizer, reads, begin, options)
        check_weights(ModelConfig(name=model), key="MODEL")
        draw = vllm_engine(model, request.length)
        fingerprint = folder_fingerprint(Path(model))
    else:
        loaded = _load(model)
        request = Request.of(tokenizer, context(loaded), begin_token(loaded), options)
        fingerprint = model_fingerprint(loaded)
        draw = partial(sample, loaded)
        if on_progress is not None:
            drawing = Drawing(request, tokens, batch_size, on_progress)
            draw, on_progress = partial(draw, on_token=drawing.on_token), drawing.on_shard
    return write_corpus(
        draw,
        request,
        out,
        tokenizer,
        tokens=tokens,
        batch_size=batch_size,
        seed=seed,
        facts={"model": {"name": model, "fingerprint": fingerprint}, "engine": engine},
        on_progress=on_progress,
    )


def folder_fingerprint(folder: Path) -> str | None:
    """SHA-256 (hexadecimal) over a model's files, by name; None if it is no folder but a model of the hub."""
    if not folder.is_dir():
        return None
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        with path.open("rb") as file:
            digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _answers(model: Path) -> bool:
    """Whether it is a sequence-to-sequence model, or an adapter of one."""
    if Path(model, ADAPTER).exists():
        return read_json(Path(model, ADAPTER)).get("task_type") == TASK_TYPES[True]
    return is_seq2seq(load_model_config(ModelConfig(name=str(model))))


def _load(name: str) -> PreTrainedModel | PeftModel:
    """A model, or a PEFT adapter with its model, on this machine's device.

    Raises:
        ConfigError: it cannot be loaded.
    """
    from peft import AutoPeftModelForCausalLM, PeftConfig

    model: Any
    if not Path(name, ADAPTER).exists():
        model = load_language_model(name, key="MODEL")
    else:
        try:
            config: Any = PeftConfig.from_pretrained(name)
            check_weights(ModelConfig(name=config.base_model_name_or_path, revision=config.revision), key="MODEL")
            with whole_adapter(f"MODEL: {name!r}"):
                model = AutoPeftModelForCausalLM.from_pretrained(name)
        except (OSError, ValueError) as error:
            raise ConfigError(f"MODEL: {name!r} cannot be loaded: {error}") from None
    return model.to(device_type())
