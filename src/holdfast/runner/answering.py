"""vLLM as the engine that answers a run's test rows, with the weights of the stage that is measured."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from holdfast.api.method import Method
from holdfast.api.tuner import Tuner
from holdfast.config.run import RunConfig
from holdfast.engines.process import Process
from holdfast.errors import ConfigError
from holdfast.models.gguf import is_gguf
from holdfast.models.kinds import is_seq2seq, sees
from holdfast.models.vllm_engine import Responder, vllm_responder
from holdfast.models.weights import merged_model

if TYPE_CHECKING:
    import torch


def check_engine_of_answers(config: RunConfig, model_config: Any, methods: Sequence[Method], tuner: Tuner) -> None:
    """Check that vLLM can answer with the weights of every stage.

    Raises:
        ConfigError: it cannot.
    """
    if config.evaluation.engine == "transformers":
        return
    acting = [method.name for method in methods if type(method).at_test is not Method.at_test]
    reasons = {
        "it answers with one process, and this run has several": Process.this().world > 1,
        "it takes no sequence-to-sequence model": is_seq2seq(model_config),
        "questions with pictures are answered by transformers alone": sees(model_config),
        "it reads no GGUF file": is_gguf(config.model.name),
        f"weights in {config.model.quantization} are not what an adapter is merged into": config.model.quantization,
        f"method {acting[0] if acting else None!r} changes the model at test time": acting,
        f"tuner {tuner.name!r} cannot be merged into the model, since {tuner.not_merged}": (
            tuner.folder != "model" and tuner.not_merged
        ),
    }
    if why := next((reason for reason, applies in reasons.items() if applies), None):
        raise ConfigError(f"evaluation.engine: vllm cannot answer for this run, since {why}; engine: transformers can")


def require_engine_of_answers(config: RunConfig) -> None:
    """Raise ConfigError where vLLM is to answer and is not installed."""
    if config.evaluation.engine == "vllm" and find_spec("vllm") is None:
        raise ConfigError(
            "evaluation.engine: vllm is not installed here; pip install vllm, or use engine: transformers"
        )


@contextmanager
def answering(
    config: RunConfig, tuner: Tuner, max_length: int, stage: Path | None, dtype: Callable[[], torch.dtype]
) -> Iterator[Responder | None]:
    """The engine that answers in the place of the run's model; None: the model answers itself.

    It is loaded with the first question. An adapter is merged into the model for it, in a temporary folder.

    Args:
        max_length: tokens of a prompt and its response, at most.
        stage: the folder of the stage whose weights it has; None: before training.
        dtype: gives the data type of the run's model.
    """
    if config.evaluation.engine == "transformers":
        yield None
        return
    model = config.model
    with ExitStack() as stack:
        loaded: list[Responder] = []

        def load() -> Responder:
            options: dict[str, Any] = {"trust_remote_code": True} if model.trust_remote_code else {}
            if stage is None:
                name, options = model.name, options | ({"revision": model.revision} if model.revision else {})
            elif tuner.folder == "model":
                name = str(stage / tuner.folder)
            else:
                name = stack.enter_context(tempfile.TemporaryDirectory(prefix="holdfast-merged-"))
                needed = f"evaluation.engine: vllm needs whole models; tuner {tuner.name!r}"
                merged = merged_model(model, stage / tuner.folder, needed)
                merged.to(dtype()).save_pretrained(name)
            return stack.enter_context(vllm_responder(name, max_length, str(dtype()).removeprefix("torch."), **options))

        def respond(prompts: Sequence[Sequence[int]], max_new_tokens: int, ends: Sequence[int]) -> list[list[int]]:
            if not loaded:
                loaded.append(load())
            return loaded[0](prompts, max_new_tokens, ends)

        yield respond
