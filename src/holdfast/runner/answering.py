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
from holdfast.models.vllm_engine import Adapter, Answers, Responder, adapter_rank, room_for, vllm_answers
from holdfast.models.weights import merged_model
from holdfast.system.device import on_gpu

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


class Answering:
    """The engine that answers in the place of a run's model, until the context ends.

    vLLM is loaded with the first question. Where it can apply a stage's adapter, it is handed that by name, beside the
    base model; without a GPU, which the training needs for itself, the base model then stays loaded for the stages
    after it. Any other adapter is merged into the model for it, in a temporary folder.

    Args:
        max_length: tokens of a prompt and its response, at most.
    """

    def __init__(self, config: RunConfig, tuner: Tuner, max_length: int):
        self.config, self.tuner, self.max_length = config, tuner, max_length
        self._loaded = ExitStack()
        self._answers: Answers | None = None
        self._rank = 0
        self._handed = 0

    def __enter__(self) -> Answering:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    @contextmanager
    def of(self, stage: Path | None, dtype: Callable[[], torch.dtype]) -> Iterator[Responder | None]:
        """What answers with the weights of a stage; None: the model answers itself.

        Args:
            stage: the stage's folder; None: before training.
            dtype: gives the data type of the run's model.
        """
        if self.config.evaluation.engine == "transformers":
            yield None
            return
        self._handed += 1
        ready: list[tuple[Answers, Adapter | None]] = []

        def respond(prompts: Sequence[Sequence[int]], max_new_tokens: int, ends: Sequence[int]) -> list[list[int]]:
            if not ready:
                ready.append(self._ready(stage, dtype()))
            answers, adapter = ready[0]
            return answers(prompts, max_new_tokens, ends, adapter)

        try:
            yield respond
        finally:
            if not self._rank or on_gpu():
                self._close()

    def _ready(self, stage: Path | None, dtype: torch.dtype) -> tuple[Answers, Adapter | None]:
        """vLLM with the weights of a stage, and the adapter that it applies to its model's."""
        weights = None if stage is None else stage / self.tuner.folder
        rank = self._rank_before_training() if weights is None else self._rank_of(weights)
        if rank and self._answers is not None and rank <= self._rank:
            answers = self._answers
        else:
            self._close()
            answers, self._rank = self._load(weights, rank, dtype), rank
            self._answers = answers
        return answers, Adapter(weights, self._handed) if rank and weights is not None else None

    def _rank_before_training(self) -> int:
        """The rank of the adapters to come, as far as is known; 0: none is applied to the base model."""
        return room_for(self.tuner.options.r) if self.tuner.served_by_vllm else 0

    def _rank_of(self, weights: Path) -> int:
        """The rank of a stage's adapter; 0: vLLM needs a whole model."""
        return adapter_rank(weights) if self.tuner.served_by_vllm else 0

    def _load(self, weights: Path | None, rank: int, dtype: torch.dtype) -> Answers:
        model = self.config.model
        options: dict[str, Any] = {"trust_remote_code": True} if model.trust_remote_code else {}
        if weights is None or rank:
            name, options = model.name, options | ({"revision": model.revision} if model.revision else {})
        elif self.tuner.folder == "model":
            name = str(weights)
        else:
            name = self._loaded.enter_context(tempfile.TemporaryDirectory(prefix="holdfast-merged-"))
            needed = f"evaluation.engine: vllm needs whole models; tuner {self.tuner.name!r}"
            merged_model(model, weights, needed).to(dtype).save_pretrained(name)
        return self._loaded.enter_context(vllm_answers(name, self.max_length, _named(dtype), rank, **options))

    def _close(self) -> None:
        self._answers, self._rank = None, 0
        self._loaded.close()


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
