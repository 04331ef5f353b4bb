"""Load a run's model with its tuner."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from holdfast.api.tuner import Tuner
from holdfast.config.run import RunConfig
from holdfast.engines.pieces import is_divided, prepare_loaded, reshard, trainable
from holdfast.engines.profiles import loading_options
from holdfast.engines.whole import fingerprint
from holdfast.errors import ConfigError
from holdfast.models.attention import fastest
from holdfast.models.quantization import ready_for_training, weight_options
from holdfast.runner.setup import Setup


def load_model(setup: Setup) -> Any:
    """:func:`load_pretrained` of a run."""
    return load_pretrained(setup.config, setup.tuner)


def load_pretrained(config: RunConfig, tuner: Tuner) -> Any:
    """The pretrained model with its tuner, on this machine's device; new weights follow from the seed.

    Raises:
        ConfigError: the weights cannot be loaded.
    """
    from transformers import AutoModelForCausalLM, set_seed

    model = config.model
    device = "cuda" if torch.cuda.is_available() else "cpu"
    attention = model.attention or fastest(config.training.precision)
    options: dict[str, Any] = {"attn_implementation": attention} if attention else {}
    options |= weight_options(model, device) | loading_options(config.training.engine)
    set_seed(config.seed)
    try:
        pretrained = AutoModelForCausalLM.from_pretrained(
            model.name,
            revision=model.revision,
            trust_remote_code=model.trust_remote_code,
            **options,
        )
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.name: the weights of {model.name!r} cannot be loaded: {error}") from None
    if model.quantization:
        pretrained = ready_for_training(pretrained)
    elif not is_divided(pretrained):
        pretrained = pretrained.to(device)
    prepare_loaded(pretrained)
    prepared = tuner.prepare(pretrained)
    trained = {name: p.requires_grad for name, p in prepared.named_parameters()}
    reshard(prepared)  # a tuner that tries a pass has frozen whole weights, and not the pieces that they are made of
    for name, p in prepared.named_parameters():
        p.requires_grad_(trained[name])
    return prepared


def trained_weights(model: nn.Module) -> str:
    """SHA-256 over the trainable weights, by name."""
    return fingerprint(trainable(model).items())
