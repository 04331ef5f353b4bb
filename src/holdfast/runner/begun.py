"""A configuration beside the record of the run that began with it: what it leaves open is what the run has."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from holdfast.config.evaluation import EvaluationConfig
from holdfast.config.run import RunConfig
from holdfast.config.section import Named
from holdfast.records.former import DROPOUT
from holdfast.runner.quiz import QUIZ, with_quiz

TYPES = (("model", "dtype"), ("training", "precision"))
"""The keys that a run settles by the machine that it begins on."""


def as_begun(config: RunConfig, record: Mapping[str, Any]) -> RunConfig:
    """The configuration with what the run began with where it names nothing else: the data types, the quiz, and LoRA's
    former dropout.

    Args:
        record: the content of run.json; empty if no run began. A run of an earlier version began without the quiz.
    """
    if not record:
        return config
    for section, key in TYPES:
        now, begun = getattr(config, section), record["config"].get(section)
        if getattr(now, key) == "auto" and isinstance(begun, Mapping) and key in begun:
            config = config.model_copy(update={section: now.model_copy(update={key: begun[key]})})
    if (record["config"].get("tuner") or {}).get("lora_dropout") == DROPOUT:
        tuner = config.tuner or Named(name="lora")
        if tuner.name == "lora" and "lora_dropout" not in tuner.options:
            tuner = Named(name="lora", **tuner.options, lora_dropout=DROPOUT)
            config = config.model_copy(update={"tuner": tuner})
    if config.evaluation.general is None:
        with contextlib.suppress(ValidationError):  # of another version, which is compared as it is
            recorded = EvaluationConfig.model_validate(record["config"].get("evaluation", {}))
            config = with_quiz(config) if recorded.general == [QUIZ] else config
    return config
