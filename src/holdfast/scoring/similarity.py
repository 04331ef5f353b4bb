"""Semantic similarity: the cosine between sentence embeddings of response and answer."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np

from holdfast.api.scorer import Record, Scorer, answers
from holdfast.errors import ConfigError

if TYPE_CHECKING:
    from holdfast.config.evaluation import EvaluationConfig
    from holdfast.models.answers import AnswerCache


class Similarity(Scorer):
    """Cosine between the embeddings of response and answer, in [-1, 1]; the best where there are several answers.

    What Continual-NExT calls accuracy. Unrelated texts of one domain have a cosine well above 0, so a score means
    little without the one before training, which is reported beside it as its floor. An empty response scores 0.

    Args:
        model: a Sentence Transformers model: folder or hub name; where None, it is not yet configured.
    """

    needs = "pip install 'holdfast[similarity]'"
    floor = True

    def __init__(self, model: str | None = None):
        super().__init__(
            "semantic_similarity",
            about="cosine of sentence embeddings of response and answer (evaluation.similarity_model)",
        )
        self.model = model

    @property
    def identity(self) -> str:
        return f"{super().identity} {self.model}"

    def configured(self, config: EvaluationConfig) -> Similarity:
        if find_spec("sentence_transformers") is None:
            raise ConfigError(f"metric semantic_similarity: needs Sentence Transformers; {self.needs}")
        return Similarity(config.similarity_model)

    def rows(self, records: Sequence[Record], cache: AnswerCache | None = None) -> list[float]:
        assert self.model is not None, "it is not configured"
        encoder = _encoder(self.model)
        texts = sorted({text for record in records for text in (record["response"], *answers(record)) if text.strip()})
        vectors = encoder.encode(texts, normalize_embeddings=True, show_progress_bar=False) if texts else []
        embeddings = dict(zip(texts, np.asarray(vectors, dtype=float), strict=True))
        return [
            max(float(embeddings[record["response"]] @ embeddings[answer]) for answer in answers(record))
            if record["response"].strip()
            else 0.0
            for record in records
        ]


SCORERS = [Similarity()]


@cache
def _encoder(model: str) -> Any:
    from sentence_transformers import SentenceTransformer

    try:
        return SentenceTransformer(model)
    except Exception as error:  # whatever a hub, a disk or a parser may raise
        raise ConfigError(
            f"evaluation.similarity_model: {model!r} cannot be loaded as a Sentence Transformers model: {error}"
        ) from None
