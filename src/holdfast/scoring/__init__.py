"""Metrics by name: one scorer each, in small modules by kind.

A scorer is found by its name in a module of this folder, or in the entry point group ``holdfast.scorers`` of an
installed package: there, the name stands for a :class:`Scorer`.
"""

from __future__ import annotations

from importlib.metadata import EntryPoint

from holdfast.api.registry import entries, load
from holdfast.api.scorer import Record, Scorer
from holdfast.config.evaluation import EvaluationConfig
from holdfast.errors import ConfigError, did_you_mean
from holdfast.scoring import (
    boxes,
    captions,
    choice,
    coin,
    f1,
    judge,
    loss,
    match,
    overlap,
    preference,
    sari,
    similarity,
    vqa,
)
from holdfast.scoring.reward import PREFIX, Reward

__all__ = ["SCORERS", "Record", "Scorer", "build", "find", "known"]

SCORERS: dict[str, Scorer] = {
    scorer.name: scorer
    for module in (match, choice, f1, overlap, sari, vqa, coin, boxes, captions, loss, similarity, preference, judge)
    for scorer in module.SCORERS
}
"""Holdfast's own, not yet configured."""


def known() -> dict[str, Scorer]:
    """Every scorer by the name of its metric, not yet configured."""
    return SCORERS | {name: _installed(entry) for name, entry in entries("scorer").items() if name not in SCORERS}


def find(name: str) -> Scorer:
    """The scorer of a metric, not yet configured.

    Raises:
        ConfigError: there is no such metric.
    """
    if name in SCORERS:
        return SCORERS[name]
    if name.startswith(PREFIX):
        return Reward(name)
    installed = entries("scorer")
    if name not in installed:
        raise ConfigError(f"unknown metric {name!r}{did_you_mean(name, [*SCORERS, *installed])}")
    return _installed(installed[name])


def build(name: str, config: EvaluationConfig) -> Scorer:
    """The scorer of a metric, configured.

    Raises:
        ConfigError: the metric is unknown, or ``evaluation`` does not say what it needs.
    """
    return find(name).configured(config)


def _installed(entry: EntryPoint) -> Scorer:
    scorer = load(entry)
    if not isinstance(scorer, Scorer) or scorer.name != entry.name:
        raise ConfigError(
            f"{entry.group}: {entry.value} must be a holdfast.api.Scorer of the name {entry.name!r}, not {scorer!r}"
        )
    return scorer
