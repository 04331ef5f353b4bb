"""Serve a stage of a run on this machine, through the OpenAI-compatible server of transformers or of vLLM."""

from __future__ import annotations

import json
import os
import shutil
import socket
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from holdfast import tuners
from holdfast.data.chat import DATE
from holdfast.data.encode import Encoder
from holdfast.deploy.export import export, method_lacks
from holdfast.errors import ConfigError
from holdfast.models.pretrained import begin_tokens, load_tokenizer
from holdfast.runner.inputs import model_inputs, tokenizer_inputs
from holdfast.runner.reload import StoredStage, check_inputs, find_stage
from holdfast.system.progress import Progress

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase

TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'assistant' %}{{ ' ' + message.content + END }}"
    "{% else %}{{ ('' if loop.first else '\\n') + message.content }}{% endif %}{% endfor %}"
)
"""``data.template: plain`` as a chat template, so that a model without one can be asked by chat, too."""

INSTALL = "--engine transformers: needs FastAPI, Uvicorn and OpenAI's types; pip install 'holdfast[serve]'"


def serve(
    run: Path,
    *,
    stage: int | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    engine: str = "transformers",
    progress: Progress | None = None,
    accept_changes: bool = False,
    trust: bool = False,
) -> None:
    """Serve a stage until the process is stopped. Requests are answered greedily unless they name a temperature.

    The model is the one that the run measured, with any tuner, in the same data type. ``/v1/completions`` takes prompts
    as text, ``/v1/chat/completions`` in the template that the run was trained with. What the run's methods do at test
    time is not done.

    Args:
        run: a run's directory.
        stage: from 1, or 0 for the model before training; if None, the one whose weights the run holds.
        engine: transformers, which answers one request after another; or vllm, which needs a whole model. So an adapter
            is merged, and the model written to ``served/`` in the run's directory.
        accept_changes: serve although the base model or the tokenizer is no longer that of the run.
        trust: run the code that the run's record names.

    Raises:
        UserError: there is no such stage, the port is taken, or the engine cannot be used here.
    """
    progress = progress or Progress()
    stored = find_stage(run, stage, trust=trust)
    model = stored.config.model
    inputs = {"model": model_inputs(model), "tokenizer": tokenizer_inputs(model)}
    check_inputs(stored.run, inputs, [], accept_changes)
    for line in method_lacks(stored.config):
        progress.line(f"warning: {line}")
    if engine == "vllm":
        _exec_vllm(stored, host, port, accept_changes)
    elif engine == "transformers":
        _serve_transformers(stored, host, port, progress)
    else:
        raise ConfigError(f"--engine: {engine!r} must be transformers or vllm")


def served_name(stored: StoredStage) -> str:
    """The model's name at the endpoint."""
    return f"{stored.run.path.resolve().name}/{stored.folder.name}"


def _tokenizer(stored: StoredStage) -> tuple[PreTrainedTokenizerBase, Encoder]:
    """The run's tokenizer, with the chat template that the run was trained with."""
    data = stored.config.data
    tokenizer = load_tokenizer(stored.config.model)
    encoder = Encoder(tokenizer, max_length=stored.run.info["max_length"], template=data.template)
    if not encoder.chat:
        begin = tokenizer.bos_token if begin_tokens(tokenizer) else ""
        tokenizer.chat_template = f"{begin}{TEMPLATE}".replace("END", json.dumps(tokenizer.eos_token or ""))
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


def _serve_transformers(stored: StoredStage, host: str, port: int, progress: Progress) -> None:
    from transformers.utils.import_utils import is_serve_available

    if not is_serve_available():
        raise ConfigError(INSTALL)
    import uvicorn

    try:
        listening = socket.create_server((host, port))
    except OSError as error:
        raise ConfigError(f"--host, --port: {host}:{port} cannot be used ({error.strerror}); choose another") from None
    server = uvicorn.Server(uvicorn.Config(application(stored), log_level="warning"))
    progress.line(f"{served_name(stored)} at http://{host}:{listening.getsockname()[1]}/v1")
    server.run(sockets=[listening])


def application(stored: StoredStage) -> Any:
    """transformers' server, an ASGI application, with a stage's model from memory."""
    assert stored.config.tuner is not None, "a run that has begun names its tuner"
    tuner = tuners.build(stored.config.tuner)
    tuner.plan(stored.config.training, 0)
    tokenizer, encoder = _tokenizer(stored)
    model, settings = stored.model(stored.config, tuner).eval(), _generation_config(encoder)
    for module in model.modules():
        if "generation_config" in vars(module):
            module.generation_config = settings
    return _application(served_name(stored), model, tokenizer)


def _application(name: str, model: Any, tokenizer: PreTrainedTokenizerBase) -> Any:
    from transformers.cli.serving.chat_completion import ChatCompletionHandler
    from transformers.cli.serving.completion import CompletionHandler
    from transformers.cli.serving.model_manager import ModelManager
    from transformers.cli.serving.response import ResponseHandler
    from transformers.cli.serving.server import build_server
    from transformers.cli.serving.transcription import TranscriptionHandler
    from transformers.cli.serving.utils import GenerationState

    class InMemory(ModelManager):
        def _load_processor(self, *_: Any, **__: Any) -> Any:
            return tokenizer

        def _load_model(self, *_: Any, **__: Any) -> Any:
            return model

        def get_gen_models(self, *_: Any) -> list[dict[str, Any]]:
            return [{"id": name, "object": "model", "created": 0, "owned_by": "holdfast"}]

    class Greedy:
        """Samples only if a request names a temperature."""

        def _build_generation_config(self, body: dict[str, Any], *args: Any, **options: Any) -> Any:
            config = super()._build_generation_config(body, *args, **options)  # type: ignore[misc]
            config.do_sample = bool(body.get("temperature"))
            return config

    class Chat(Greedy, ChatCompletionHandler):
        pass

    class Completion(Greedy, CompletionHandler):
        pass

    class Response(Greedy, ResponseHandler):
        pass

    manager, state = InMemory(force_model=name), GenerationState()
    template = {"enable_thinking": False, "date_string": DATE}
    newer: dict[str, Any] = {}
    if find_spec("transformers.cli.serving.systemone") is not None:  # transformers 5.23
        from transformers.cli.serving.systemone import SystemOneHandler

        newer["systemone_handler"] = SystemOneHandler(manager, state, template)
    return build_server(
        manager,
        Chat(manager, state, template),
        completion_handler=Completion(manager, state),
        response_handler=Response(manager, state, template),
        transcription_handler=TranscriptionHandler(manager, state),
        **newer,
        generation_state=state,
    )


def _exec_vllm(stored: StoredStage, host: str, port: int, accept_changes: bool) -> None:
    """Replace this process by vLLM's server."""
    program = shutil.which("vllm")
    if program is None:
        raise ConfigError("--engine: vllm is not installed; pip install vllm, or use --engine transformers")
    if not stored.number:
        raise ConfigError("--stage: 0 is the base model itself, which vllm serves without holdfast")
    folder = stored.run.path / "served" / stored.folder.name
    export(stored.run.path, folder, stage=stored.number, merge=True, accept_changes=accept_changes, trust=True)
    tokenizer, encoder = _tokenizer(stored)
    tokenizer.save_pretrained(folder)
    _generation_config(encoder).save_pretrained(folder)
    arguments = ["serve", str(folder), "--served-model-name", served_name(stored), "--host", host, "--port", str(port)]
    os.execv(program, [program, *arguments])
