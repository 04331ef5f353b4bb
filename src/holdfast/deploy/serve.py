"""Serve a stage of a run on this machine, by OpenAI's interface: in this process, or through vLLM."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from holdfast import tuners
from holdfast.data.encode import Encoder, resolve_max_length
from holdfast.data.encode_apart import encoder_of
from holdfast.deploy.export import export, method_lacks
from holdfast.deploy.follow import Follower, held_stage
from holdfast.deploy.openai.limits import Limits
from holdfast.deploy.ports import listening
from holdfast.errors import ConfigError
from holdfast.models.batcher import Batcher
from holdfast.models.kinds import is_seq2seq
from holdfast.models.pretrained import begin_tokens, load_model_config, load_tokenizer
from holdfast.models.seq2seq import start_of
from holdfast.models.sight import load_sight, sight_of
from holdfast.runner.inputs import model_inputs, tokenizer_inputs
from holdfast.runner.reload import StoredStage, check_inputs, find_stage
from holdfast.system.progress import Progress

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase

    from holdfast.deploy.openai.exchange import Backend

TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'assistant' %}{{ ' ' }}CONTENT{{ END }}"
    "{% else %}{{ '' if loop.first else '\\n' }}CONTENT{% endif %}{% endfor %}"
)
"""``data.template: plain`` as a chat template, for vLLM."""
TEXT = "{{ message.content }}"
PARTS = (
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{{ part.text if part.type == 'text' else IMAGE }}{% endfor %}{% endif %}"
)
"""A message's content in such a template, of a model that sees."""

INSTALL = "--engine transformers: needs Starlette and Uvicorn; pip install 'holdfast[serve]'"
MOST_CONNECTIONS = 512
SHUTDOWN_SECONDS = 5
SCORING_THREADS = 4  # each waits for its turn most of the time


def serve(
    run: Path | str,
    *,
    stage: int | None = None,
    follow: bool = False,
    host: str = "127.0.0.1",
    port: int = 8000,
    engine: str = "transformers",
    limits: Limits | None = None,
    progress: Progress | None = None,
    accept_changes: bool = False,
    trust: bool = False,
) -> None:
    """Serve a stage until the process is stopped. Requests are answered greedily unless they name a temperature.

    The model is the one that the run measured, with any tuner, in the same data type. ``/v1/completions`` takes prompts
    as text or tokens, ``/v1/chat/completions`` conversations in the template that the run was trained with. What the
    run's methods do at test time is not done.

    Args:
        run: a run's directory.
        stage: from 1, or 0 for the model before training; if None, the one whose weights the run holds.
        follow: serve the stage that the run holds at any time, of those that are measured and judged: when it changes,
            the new weights are loaded beside the old ones, and answer the requests that come from then on.
        host: an address of this machine; 0.0.0.0 or :: for all of them.
        engine: transformers; or vllm, which needs a whole model. So an adapter is merged, and the model written to
            ``served/`` in the run's directory.
        limits: of requests, for the engine transformers; None: :class:`Limits`'s own.
        accept_changes: serve although the base model or the tokenizer is no longer that of the run.
        trust: run the code that the run's record names.

    Raises:
        UserError: there is no such stage, the port is taken, or the engine cannot be used here.
    """
    path, progress = Path(run), progress or Progress()
    if not host.strip():
        raise ConfigError("--host: is empty, which would be every address of this machine; say 0.0.0.0 for that")
    if follow and (stage is not None or engine != "transformers"):
        other = "--stage, which never changes" if stage is not None else f"--engine {engine}, which loads a model once"
        raise ConfigError(f"--follow: cannot be used with {other}")

    def find(number: int | None) -> StoredStage:
        stored = find_stage(path, number, trust=trust)
        model = stored.config.model
        inputs = {"model": model_inputs(model), "tokenizer": tokenizer_inputs(model)}
        check_inputs(stored.run, inputs, [], accept_changes)
        return stored

    stored = find(held_stage(path) if follow else stage)
    for line in method_lacks(stored.config):
        progress.line(f"warning: {line}")
    if engine == "vllm":
        if limits is not None:
            raise ConfigError("--engine: vllm has limits of its own; those of holdfast are for transformers")
        _exec_vllm(stored, host, port, accept_changes)
    elif engine == "transformers":
        _serve(stored, host, port, limits or Limits(), progress, find if follow else None)
    else:
        raise ConfigError(f"--engine: {engine!r} must be transformers or vllm")


def served_name(stored: StoredStage) -> str:
    """The model's name at the endpoint."""
    return f"{stored.run.path.resolve().name}/{stored.folder.name}"


def _tokenizer(stored: StoredStage) -> tuple[PreTrainedTokenizerBase, Encoder]:
    """The run's tokenizer, with the chat template that the run was trained with."""
    data = stored.config.data
    tokenizer, config = load_tokenizer(stored.config.model), load_model_config(stored.config.model)
    sight = load_sight(stored.config.model, config, tokenizer)
    encoder = encoder_of(config, tokenizer, sight, max_length=stored.run.max_length, template=data.template)
    if not encoder.chat:
        begin = tokenizer.bos_token if begin_tokens(tokenizer) else ""
        content = TEXT if sight is None else PARTS.replace("IMAGE", json.dumps(sight.placeholder))
        template = TEMPLATE.replace("END", json.dumps(tokenizer.eos_token or "")).replace("CONTENT", content)
        tokenizer.chat_template = f"{begin}{template}"
    tokenizer.clean_up_tokenization_spaces = False
    return tokenizer, encoder


def _generation_config(encoder: Encoder) -> GenerationConfig:
    """Greedy, as in evaluation: the model's own sampling and penalties do not apply."""
    from transformers import GenerationConfig

    return GenerationConfig(
        do_sample=False,
        use_cache=True,
        eos_token_id=encoder.stop_ids or None,
        pad_token_id=encoder.tokenizer.pad_token_id,
    )


def _serve(
    stored: StoredStage,
    host: str,
    port: int,
    limits: Limits,
    progress: Progress,
    find: Callable[[int], StoredStage] | None,
) -> None:
    """Serve a stage, or with ``find`` the one that the run holds."""
    try:
        import uvicorn

        from holdfast.deploy.openai.application import Service
        from holdfast.deploy.openai.connection import Connection
    except ImportError:
        raise ConfigError(INSTALL) from None
    socket = listening(host, port)
    service = Service(backend(stored, limits, follow=find is not None), limits)
    config = uvicorn.Config(
        service.application(),
        http=Connection,
        log_level="warning",
        lifespan="off",
        limit_concurrency=MOST_CONNECTIONS,
        timeout_graceful_shutdown=SHUTDOWN_SECONDS,
    )
    server = uvicorn.Server(config)
    shown = f"[{host}]" if ":" in host else host
    progress.line(f"{served_name(stored)} at http://{shown}:{socket.getsockname()[1]}/v1")
    if find is None:
        server.run(sockets=[socket])
        return
    follower = Follower(service, stored, find, lambda new: backend(new, limits, follow=True), progress.line)
    follower.start()
    server.run(sockets=[socket])
    follower.stop()


def application(stored: StoredStage, limits: Limits | None = None) -> Any:
    """OpenAI's interface to a stage, an ASGI application, with its model in memory."""
    from holdfast.deploy.openai.application import Service

    return Service(backend(stored, limits or Limits()), limits or Limits()).application()


def backend(stored: StoredStage, limits: Limits, *, follow: bool = False) -> Backend:
    """What answers requests: the stage's model, as the run measured it, and its prompts.

    Args:
        follow: the server follows the run, and lists it by the run's name, which stays.
    """
    from holdfast.deploy.openai.exchange import Backend
    from holdfast.deploy.openai.prompts import Prompts

    config = stored.config
    assert config.tuner is not None, "a run that has begun names its tuner"
    tuner = tuners.build(config.tuner)
    tuner.plan(config.training, 0)
    tokenizer = load_tokenizer(config.model)
    model = stored.model(config, tuner).eval()
    text_config, sight = model.config.get_text_config(), sight_of(model)
    if sight is not None and not tokenizer.chat_template:
        tokenizer.chat_template = sight.processor.tokenizer.chat_template
    measured = stored.run.max_length
    known = getattr(text_config, "max_position_embeddings", None)
    prompts = Prompts(
        tokenizer,
        config.data.template,
        context=resolve_max_length(None if known else measured, model.config, tuner.virtual_tokens),
        vocabulary=text_config.vocab_size,
        max_tokens=limits.max_tokens,
        start=start_of(model),
        sight=sight,
        pictures=limits.pictures,
    )
    batcher = Batcher(
        model,
        batch_size=config.evaluation.batch_size,
        batch_tokens=config.evaluation.batch_size * measured,
        concurrency=limits.concurrency,
        pad_token_id=tokenizer.pad_token_id,
    )
    threads = ThreadPoolExecutor(SCORING_THREADS, thread_name_prefix="holdfast likelihoods")
    name = served_name(stored)
    return Backend(name, stored.number, name.rpartition("/")[0] if follow else name, prompts, batcher, threads)


def _exec_vllm(stored: StoredStage, host: str, port: int, accept_changes: bool) -> None:
    """Replace this process by vLLM's server."""
    program = shutil.which("vllm")
    if program is None:
        raise ConfigError("--engine: vllm is not installed; pip install vllm, or use --engine transformers")
    if is_seq2seq(load_model_config(stored.config.model)):
        raise ConfigError("--engine: vllm serves causal models; a sequence-to-sequence one takes --engine transformers")
    if not stored.number:
        raise ConfigError("--stage: 0 is the base model itself, which vllm serves without holdfast")
    folder = stored.run.path / "served" / stored.folder.name
    export(stored.run.path, folder, stage=stored.number, merge=True, accept_changes=accept_changes, trust=True)
    tokenizer, encoder = _tokenizer(stored)
    tokenizer.save_pretrained(folder)
    _generation_config(encoder).save_pretrained(folder)
    arguments = ["serve", str(folder), "--served-model-name", served_name(stored), "--host", host, "--port", str(port)]
    os.execv(program, [program, *arguments])
