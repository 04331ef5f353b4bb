"""A stage of a run behind an OpenAI-compatible server on this machine: transformers' own, or vLLM's."""

from __future__ import annotations

import json
import os
import shutil
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any

from holdfast import tuners
from holdfast.data.encode import DATE, Encoder
from holdfast.deploy.export import export, method_lacks
from holdfast.errors import ConfigError
from holdfast.models.pretrained import begin_tokens, load_tokenizer
from holdfast.runner.reload import StoredStage, find_stage
from holdfast.system.progress import Progress

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase

TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'assistant' %}{{ ' ' + message.content + END }}"
    "{% else %}{{ ('' if loop.first else '\\n') + message.content }}{% endif %}{% endfor %}"
)
"""data.template: plain, as a chat template, so that a model without one can be asked by chat too."""

INSTALL = "--engine transformers: needs FastAPI, Uvicorn and OpenAI's types; pip install 'holdfast[serve]'"


def serve(
    run: Path,
    *,
    stage: int | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    engine: str = "transformers",
    progress: Progress | None = None,
) -> None:
    """Serve a stage until the process is stopped; requests are answered greedily unless they name a temperature.

    The model is the one that the run measured, whatever its tuner, in the same data type; prompts are taken at
    ``/v1/completions`` as text, and at ``/v1/chat/completions`` in the template that the run was trained with. What
    the run's methods do at test time is not done.

    Args:
        run: a run's directory.
        stage: from 1, or 0 for the model before training; where absent, the one whose weights the run holds.
        engine: transformers, which answers one request after another; or vllm, which needs a whole model: it is
            written, an adapter merged into it, to ``served/`` in the run's directory.

    Raises:
        UserError: there is no such stage, the port is taken, or the engine cannot be used here.
    """
    progress = progress or Progress()
    found = find_stage(run, stage)
    for line in method_lacks(found.config):
        progress.line(f"warning: {line}")
    if engine == "vllm":
        _exec_vllm(found, host, port)
    elif engine == "transformers":
        _serve_transformers(found, host, port, progress)
    else:
        raise ConfigError(f"--engine: {engine!r} must be transformers or vllm")


def served_name(found: StoredStage) -> str:
    """What the model is called at the endpoint."""
    return f"{found.run.path.resolve().name}/{found.folder.name}"


def _tokenizer(found: StoredStage) -> tuple[PreTrainedTokenizerBase, Encoder]:
    """The run's tokenizer, whose chat template is the one that the run was trained with."""
    data = found.config.data
    tokenizer = load_tokenizer(found.config.model)
    encoder = Encoder(tokenizer, max_length=found.run.info["max_length"], template=data.template)
    if not encoder.chat:
        begin = tokenizer.bos_token if begin_tokens(tokenizer) else ""
        tokenizer.chat_template = f"{begin}{TEMPLATE}".replace("END", json.dumps(tokenizer.eos_token or ""))
    tokenizer.clean_up_tokenization_spaces = False
    return tokenizer, encoder


def _generation_config(encoder: Encoder) -> GenerationConfig:
    """As in evaluation: the model's own sampling and penalties do not apply."""
    from transformers import GenerationConfig

    return GenerationConfig(
        do_sample=False,
        use_cache=True,
        eos_token_id=encoder.stop_ids or None,
        pad_token_id=encoder.tokenizer.pad_token_id,
    )


def _serve_transformers(found: StoredStage, host: str, port: int, progress: Progress) -> None:
    from transformers.utils.import_utils import is_serve_available

    if not is_serve_available():
        raise ConfigError(INSTALL)
    import uvicorn

    try:
        listening = socket.create_server((host, port))
    except OSError as error:
        raise ConfigError(f"--host, --port: {host}:{port} cannot be used ({error.strerror}); choose another") from None
    server = uvicorn.Server(uvicorn.Config(application(found), log_level="warning"))
    progress.line(f"{served_name(found)} at http://{host}:{listening.getsockname()[1]}/v1")
    server.run(sockets=[listening])


def application(found: StoredStage) -> Any:
    """transformers' server, an ASGI application, with a stage's model, which it is given in memory."""
    assert found.config.tuner is not None, "a run that has begun names its tuner"
    tuner = tuners.build(found.config.tuner)
    tuner.plan(found.config.training, 0)
    tokenizer, encoder = _tokenizer(found)
    model, settings = found.model(found.config, tuner).eval(), _generation_config(encoder)
    for module in model.modules():
        if "generation_config" in vars(module):
            module.generation_config = settings
    return _application(served_name(found), model, tokenizer)


def _application(name: str, model: Any, tokenizer: PreTrainedTokenizerBase) -> Any:
    from transformers.cli.serving.chat_completion import ChatCompletionHandler
    from transformers.cli.serving.completion import CompletionHandler
    from transformers.cli.serving.model_manager import ModelManager
    from transformers.cli.serving.response import ResponseHandler
    from transformers.cli.serving.server import build_server
    from transformers.cli.serving.systemone import SystemOneHandler
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
        """Samples only where a request names a temperature."""

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
    return build_server(
        manager,
        Chat(manager, state, template),
        completion_handler=Completion(manager, state),
        response_handler=Response(manager, state, template),
        transcription_handler=TranscriptionHandler(manager, state),
        systemone_handler=SystemOneHandler(manager, state, template),
        generation_state=state,
    )


def _exec_vllm(found: StoredStage, host: str, port: int) -> None:
    """Become vLLM's server."""
    program = shutil.which("vllm")
    if program is None:
        raise ConfigError("--engine: vllm is not installed; pip install vllm, or use --engine transformers")
    if not found.number:
        raise ConfigError("--stage: 0 is the base model itself, which vllm serves without holdfast")
    folder = found.run.path / "served" / found.folder.name
    export(found.run.path, folder, stage=found.number, merge=True)
    tokenizer, encoder = _tokenizer(found)
    tokenizer.save_pretrained(folder)
    _generation_config(encoder).save_pretrained(folder)
    arguments = ["serve", str(folder), "--served-model-name", served_name(found), "--host", host, "--port", str(port)]
    os.execv(program, [program, *arguments])
