"""What a run on a model that sees refuses before training, each with its reason."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from holdfast.api.method import Method
from holdfast.api.tuner import Tuner
from holdfast.config.run import RunConfig
from holdfast.errors import ConfigError
from holdfast.models.kinds import sees
from holdfast.training.requirements import check_kind

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def check_sight(model_config: PretrainedConfig, config: RunConfig, methods: Sequence[Method], tuner: Tuner) -> None:
    """Check that a configuration can train a model that sees; one that reads text alone passes.

    Raises:
        ConfigError: it cannot; the message names the key and the reason.
    """
    if not sees(model_config):
        return
    check_kind(model_config, [*methods, tuner])
    if config.data.packing:
        raise ConfigError(
            f"data.packing: the model sees ({model_config.model_type}), and finds the positions of its pictures in "
            "whole rows; turn packing off"
        )
