"""Metrics by name: one scorer each, in small modules by kind."""

from __future__ import annotations

from holdfast.api.scorer import Record, Scorer
from holdfast.config.evaluation import EvaluationConfig
from holdfast.errors import ConfigError, did_you_mean
from holdfast.scoring import choice, f1, loss, match, overlap, sari

__all__ = ["CONFIGURED", "METRICS", "SCORERS", "Record", "Scorer", "build", "check_name"]

SCORERS: dict[str, Scorer] = {
    scorer.name: scorer for module in (match, choice, f1, overlap, sari, loss) for scorer in module.SCORERS
}
"""Those that need nothing but their name."""

CONFIGURED = {
    "semantic_similarity": "cosine of sentence embeddings of response and answer (evaluation.similarity_model)",
    "judge": "a language model finds that it says what the answer says (evaluation.judge)",
}
"""Those that the configuration says more about, each in a line."""

METRICS = (*SCORERS, *CONFIGURED)


def build(name: str, config: EvaluationConfig) -> Scorer:
    """The scorer of a metric.

    Raises:
        ConfigError: the metric is unknown, or ``evaluation`` does not say what it needs.
    """
    check_name(name)
    if name == "semantic_similarity":
        from holdfast.scoring.similarity import Similarity

        return Similarity(config.similarity_model)
    if name == "judge":
        from holdfast.scoring.judge import Judge

        if config.judge is None:
            raise ConfigError("metric judge: needs evaluation.judge, with the url and model of an endpoint")
        return Judge(config.judge)
    return SCORERS[name]


def check_name(name: str) -> None:
    """ConfigError if there is no such metric."""
    if name not in METRICS:
        raise ConfigError(f"unknown metric {name!r}{did_you_mean(name, METRICS)}")
