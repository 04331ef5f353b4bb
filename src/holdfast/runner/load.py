"""Load the pretrained model of a run, with its tuner."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from holdfast.api.tuner import Tuner
from holdfast.config.run import RunConfig
from holdfast.engines.pieces import is_divided, prepare_loaded, reshard, trainable
from holdfast.engines.profiles import loading_options
from holdfast.engines.whole import fingerprint, former_names
from holdfast.errors import RunDirectoryError
from holdfast.models.attention import fastest
from holdfast.models.kinds import sees
from holdfast.models.pretrained import load_tokenizer, readable
from holdfast.models.quantization import ready_for_training, weight_options
from holdfast.models.seq2seq import callable_as_causal
from holdfast.models.sight import Sight, callable_with_pictures, load_sight
from holdfast.models.weights import load_language_model
from holdfast.runner.memory import lower_for_loading, what_to_lower
from holdfast.runner.setup import Setup
from holdfast.system.device import device_type

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


def load_model(setup: Setup) -> PreTrainedModel | PeftModel:
    """Load the model of a run, before its first stage."""
    return load_pretrained(setup.config, setup.tuner, setup.encoder.sight)


def load_pretrained(config: RunConfig, tuner: Tuner, sight: Sight | None = None) -> PreTrainedModel | PeftModel:
    """Load the pretrained model with its tuner, on this machine's device; the seed decides the tuner's new weights.

    Args:
        sight: how the model sees; where absent, its processor is loaded, if it has one.

    Raises:
        ConfigError: the weights cannot be loaded, or some of the model's are missing.
    """
    from transformers import set_seed

    model = config.model
    device = device_type()
    attention = model.attention or fastest(config.training.precision)
    options: dict[str, Any] = {"attn_implementation": attention} if attention else {}
    options |= weight_options(model, device) | loading_options(config.training.engine)
    set_seed(config.seed)
    with what_to_lower(lambda: f"model.name: {model.name!r}", lambda: lower_for_loading(model)):
        pretrained = load_language_model(
            model.name, revision=model.revision, trust_remote_code=model.trust_remote_code, **options
        )
        if model.quantization:
            pretrained = ready_for_training(pretrained)
        elif not is_divided(pretrained):
            pretrained = pretrained.to(device)
    prepare_loaded(pretrained)
    prepared = tuner.prepare(pretrained)
    trained = {name: p.requires_grad for name, p in prepared.named_parameters()}
    reshard(prepared)  # a tuner may have tried a pass, after which weights are whole, and frozen these, not the shards
    for name, p in prepared.named_parameters():
        p.requires_grad_(trained[name])
    if sight is None and sees(pretrained.config):
        sight = load_sight(model, pretrained.config, load_tokenizer(model))
    return callable_with_pictures(callable_as_causal(prepared), sight)


def trained_weights(model: nn.Module, former: bool = False) -> str:
    """SHA-256 over the trainable weights, by name; ``former``: by the names that version 0.1.0 gave them."""
    names = former_names(model) if former else {}
    return fingerprint((names.get(name, name), p) for name, p in trainable(model).items())


def load_weights(tuner: Tuner, model: Any, stage: Path) -> None:
    """Load what a tuner trained in a stage.

    Raises:
        RunDirectoryError: its files are missing or damaged.
    """
    folder = stage / tuner.folder
    with readable(f"{folder}: cannot be loaded", RunDirectoryError):
        tuner.load(model, folder)
