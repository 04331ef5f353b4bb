"""The built-in quiz, as what a run measures of general ability where nobody says what."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from holdfast.api.task import General, Stream
from holdfast.config.evaluation import EVERYDAY, GeneralConfig
from holdfast.config.run import RunConfig
from holdfast.errors import DataError
from holdfast.evaluation.abilities import load_general

if TYPE_CHECKING:
    from holdfast.data.encode import Encoder

logger = logging.getLogger("holdfast")

QUIZ = GeneralConfig.model_validate(EVERYDAY)


def with_quiz(config: RunConfig) -> RunConfig:
    """The configuration with the quiz as its measure of general ability."""
    evaluation = config.evaluation.model_copy(update={"general": [QUIZ]})
    return config.model_copy(update={"evaluation": evaluation})


def askable(encoder: Encoder) -> list[General]:
    """The quiz, if the encoder has a chat template and all questions fit; says why, where they do not."""
    if not encoder.chat:
        return []
    from holdfast.evaluation.general import encode_choices  # torch comes with it

    quiz = load_general([QUIZ], Stream("quiz", [], []))
    try:
        for measure in quiz:
            encode_choices(encoder, measure)
    except DataError as error:
        logger.warning("the built-in quiz cannot be asked, so it is left out: %s", error)
        return []
    return quiz
