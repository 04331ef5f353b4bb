"""The settings that a user of learn need not give: they follow from the machine, the model and the data."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from holdfast.api.rows import row_length
from holdfast.api.task import Example, Stream
from holdfast.config.evaluation import EVERYDAY
from holdfast.config.run import RUN, RunConfig
from holdfast.config.section import Named
from holdfast.config.training import TrainingConfig
from holdfast.data.encode import Encoder, resolve_max_length
from holdfast.data.encode_apart import encoder_of
from holdfast.errors import ConfigError, DataError
from holdfast.models.head import begin_token, context
from holdfast.models.kinds import is_seq2seq
from holdfast.models.precision import counted
from holdfast.models.pretrained import load_model_config, load_tokenizer
from holdfast.models.sampling import sample
from holdfast.models.sight import load_sight
from holdfast.records.kept import OWN
from holdfast.rehearsal.corpus import MANIFEST, Drawing, write_corpus
from holdfast.rehearsal.request import Request, SampleOptions
from holdfast.runner.load import load_pretrained
from holdfast.runner.quiz import askable
from holdfast.runner.rows import encode_tasks
from holdfast.runner.setup import build_encoder, build_tuner, resolve, settle_types
from holdfast.system.device import device_type, on_gpu
from holdfast.system.interrupt import Interrupt
from holdfast.system.manifest import folder_facts, note
from holdfast.system.progress import Progress
from holdfast.training.memory_estimate import Estimate, free_memory

logger = logging.getLogger("holdfast")

OWN_SAMPLES = 32
SHORTEST, LONGEST = 64, 512
"""Tokens of an own sample."""
LONGEST_ON_A_CPU = 128
QUIZ_ON_A_CPU = 100
"""Questions of the built-in quiz, an even sample of them; elsewhere it has all."""
CHECKPOINTS = 10
"""Of a stage at least, where they are small."""
SAVE_EVERY: int = TrainingConfig.model_fields["save_every"].default
USABLE = 0.8
"""Share of the free memory that training may fill."""
EPOCHS = ((5_000, 3.0), (20_000, 2.0))
"""Passes over the rows, by their number; 1 beyond."""
LEAST_STEPS, MOST_EPOCHS = 60, 10.0
"""Few rows are passed over more often, until there are so many optimizer steps, but no more often than this."""
BATCHES = ((100, 4), (400, 8))
"""Rows of an optimizer step, by the number of rows; 16 beyond."""


def type_settings(config: RunConfig) -> dict[str, Any]:
    """The data types of weights and training, by the machine, the model and the tuner."""
    config = config.model_copy(update={"keep": None})  # what it weighs is settled later
    settled, _ = settle_types(config, load_model_config(config.model), resolve(config).tuner)
    return {"model": {"dtype": settled.model.dtype}, "training": {"precision": settled.training.precision}}


def _encoder(config: RunConfig) -> Encoder:
    model_config, tokenizer = load_model_config(config.model), load_tokenizer(config.model)
    most = resolve_max_length(config.data.max_length, model_config)
    return encoder_of(
        model_config,
        tokenizer,
        load_sight(config.model, model_config, tokenizer),
        max_length=most,
        template=config.data.template,
        long_answers="cut",
    )


class Lengths:
    """How many tokens rows have, from a choice of them that holds the longest.

    Attributes:
        longest: of a row.
        usual: nine rows in ten have no more.
    """

    def __init__(self, config: RunConfig, examples: Sequence[Example]):
        encoder = _encoder(config)
        by_length = sorted(examples, key=lambda example: len(example.text or example.question + example.answer))
        chosen = [*by_length[-64:], *by_length[:: math.ceil(len(by_length) / 256)]]
        found: list[int] = []
        for example in chosen:
            try:
                found += map(row_length, encoder.encode(example))
            except DataError:  # the run tells of it
                found.append(encoder.max_length)
        self.longest = max(found)
        spread = sorted(found[64:] or found)
        self.usual = spread[math.ceil(0.9 * len(spread)) - 1]


def sample_length(lengths: Lengths) -> int:
    """Tokens of an own sample at most: about as long as rows are, so that they cost as much."""
    most = LONGEST if on_gpu() else LONGEST_ON_A_CPU
    return min(max(2 ** math.ceil(math.log2(max(lengths.usual, 2))), SHORTEST), most)


def own_samples(config: RunConfig, length: int) -> dict[str, Any]:
    """How the model writes samples of itself: as chats, or else from its first token; empty where it cannot."""
    tokenizer, model_config = load_tokenizer(config.model), load_model_config(config.model).get_text_config()
    if is_seq2seq(model_config):
        logger.warning(
            "a sequence-to-sequence model only answers prompts, so it writes no samples to rehearse or measure"
        )
        return {}
    most, begin = (getattr(model_config, key, None) for key in ("max_position_embeddings", "bos_token_id"))
    for chat in (None, False):
        try:
            request = Request.of(tokenizer, most, begin, SampleOptions(length=min(length, most or length), chat=chat))
        except ConfigError as error:
            reason = error
        else:
            return {"length": request.length, "chat": bool(request.turn)}
    logger.warning("the model cannot write samples of itself, so none are rehearsed or measured: %s", reason)
    return {}


def general_settings(config: RunConfig, own: dict[str, Any]) -> list[dict[str, Any]]:
    """What is measured of general ability: the loss on own samples and, of a model with a chat template, the quiz."""
    measures: list[dict[str, Any]] = [{"name": "own", "path": f"{RUN}/{OWN}"}] if own else []
    if askable(_encoder(config)):
        measures.append({"name": EVERYDAY} | ({} if on_gpu() else {"rows": QUIZ_ON_A_CPU}))
    return measures


def rehearsal_settings(own: dict[str, Any], memory: bool) -> list[dict[str, Any]]:
    """What is rehearsed: rows of earlier tasks, unless none are kept, and the model's own samples."""
    methods: list[dict[str, Any]] = [{"name": "replay"}] if memory else []
    if own:
        methods.append({"name": "kl_replay"} | own)
    return methods or [{"name": "sequential"}]


def training_settings(rows: int, adapters: bool) -> dict[str, Any]:
    """Epochs and batch size by the number of rows: few rows need more passes, and smaller steps.

    Args:
        adapters: only adapters are trained; their checkpoints are small, so that there can be many.
    """
    epochs = next((epochs for limit, epochs in EPOCHS if rows < limit), 1.0)
    batch = next((size for limit, size in BATCHES if rows < limit), 16)
    once = math.ceil(rows / batch)
    epochs = max(epochs, min(float(math.ceil(LEAST_STEPS / once)), MOST_EPOCHS))
    steps = math.ceil(epochs * once)
    often = {"save_every": min(math.ceil(steps / CHECKPOINTS), SAVE_EVERY)} if adapters else {}
    return {"epochs": epochs, "batch_size": batch, "learning_rate": 2e-4} | often


def memory_settings(config: RunConfig, lengths: Lengths) -> dict[str, Any]:
    """The largest micro-batch that fits this machine's memory, with activation checkpointing where it must be."""
    device = device_type()
    batch = config.training.batch_size
    extra = sum(float(method.options.get("ratio", 0.25)) for method in config.method if method.name != "sequential")
    tuner, model_config = resolve(config).tuner, load_model_config(config.model)
    config, _ = settle_types(config, model_config, tuner)
    weights, computation = counted(config.model.dtype), counted(config.training.precision)
    try:
        estimate = Estimate(model_config, tuner, lengths.longest, computation, device, weights)
        free = USABLE * free_memory(device)
        for checkpointing in (False, True):
            for micro in (size for size in range(batch, 0, -1) if batch % size == 0):
                memory = estimate.memory(math.ceil(micro * (1 + extra)), config.model.quantization is not None)
                if checkpointing and memory.checkpointed is None:
                    continue
                if memory.peak(checkpointing, accumulation=micro < batch) <= free:
                    return {"micro_batch_size": micro} | ({"gradient_checkpointing": True} if checkpointing else {})
    except ConfigError:  # shapes alone do not tell it
        return {}
    logger.warning("training may not fit into this machine's memory; `holdfast doctor MODEL` shows what would")
    return {"micro_batch_size": 1, "gradient_checkpointing": True}


def check_rows(stream: Stream, config: RunConfig) -> None:
    """Raise DataError, which names them by their files, if new rows cannot be encoded."""
    encode_tasks(stream, build_encoder(resolve(config)), config)


def write_own_samples(
    path: Path, config: RunConfig, own: dict[str, Any], progress: Progress, interrupt: Interrupt
) -> None:
    """Let the model write samples of itself into the run's directory, unless they are there.

    Args:
        own: how: ``length`` and ``chat``.

    Raises:
        ConfigError: the model cannot.
        Interrupted: SIGINT or SIGTERM asked to stop.
    """
    if not own:
        raise ConfigError(f"evaluation.general: {RUN}/{OWN}: the model cannot write samples of itself; leave it out")
    folder = path / OWN
    if (folder / MANIFEST).is_file():
        return
    tokens = OWN_SAMPLES * own["length"] // 2
    progress.line(f"the model writes {tokens:,} tokens of itself, on which its general loss is measured")
    tuner = build_tuner(config.model_copy(update={"tuner": Named(name="full")}))
    config, _ = settle_types(config, load_model_config(config.model), tuner)
    model = load_pretrained(config, tuner)
    tokenizer = load_tokenizer(config.model)
    request = Request.of(tokenizer, context(model), begin_token(model), SampleOptions(**own))
    with interrupt.bar(progress, "the model writes samples of itself") as on_progress:
        drawing = Drawing(request, tokens, OWN_SAMPLES, on_progress)
        write_corpus(
            partial(sample, model, on_token=drawing.on_token),
            request,
            folder,
            tokenizer,
            tokens=tokens,
            batch_size=OWN_SAMPLES,
            seed=config.seed,
            on_progress=drawing.on_shard,
        )
    files = sorted(file for file in folder.rglob("*") if file.is_file() and not file.name.startswith("."))
    note(path, folder, folder_facts(folder, files))
