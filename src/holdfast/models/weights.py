"""Load the weights of a pretrained model, and refuse one whose files lack some of them."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from holdfast.config.model import ModelConfig
from holdfast.engines.profiles import loading_options
from holdfast.engines.unused import leave_deepspeed_unimported
from holdfast.errors import ConfigError
from holdfast.models.gguf import Origin, is_gguf, located, weight_types
from holdfast.models.kinds import auto_class
from holdfast.models.pretrained import load_model_config, readable
from holdfast.system.manifest import check_weights_files, file_facts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger("holdfast")

HUB_OPTIONS = ("revision", "trust_remote_code", "local_files_only")
"""Options of loading that say where a model's files are, and whether its code may run."""

NAMED = 20
"""So many tensors are named in a message; of more, the number is told."""


def load_language_model(name: str | Path, *, key: str = "model.name", **options: Any) -> PreTrainedModel:
    """Load a language model with its weights: a sequence-to-sequence one where its configuration says so, or causal.

    transformers fills tensors that the files lack with random numbers. Tied weights, and those that the architecture
    makes itself, are not lacking. Tensors of the files that the model does not use are told in a warning.

    The configuration of a model of a GGUF file says under ``converted_from`` where its weights come from: the file's
    name, its SHA-256, and the share of its weights of each type.

    Args:
        name: folder, hub name, or GGUF file.
        key: where the name comes from, for messages.
        options: of ``from_pretrained``.

    Raises:
        ConfigError: the weights cannot be loaded, or the files lack tensors of the model, or hold some of another
            shape; the message names them.
        RunDirectoryError: the folder is of a run or an export, and a file is damaged.
    """
    leave_deepspeed_unimported()
    check_weights_files(Path(name))
    with readable(f"{key}: the weights of {str(name)!r} cannot be loaded"):
        model, report = _load(name, options)
    _check(f"{key}: {str(name)!r}", type(model).__name__, report)
    if getattr(model, "_hf_peft_config_loaded", False):  # transformers loads an adapter that lies beside the weights
        raise ConfigError(
            f"{key}: {str(name)!r} holds an adapter beside a whole model; merge them (PEFT's merge_and_unload), or "
            "take its adapter_config.json away"
        )
    return model


def check_weights(model: ModelConfig, key: str = "model.name") -> bool:
    """Check that a model's files have all its tensors, by their names and shapes; the weights are not read.

    Returns:
        whether that could be checked: a model of the hub may not be on this machine yet, and weights in a quantised
        format of their own, or of a model with code of its own, may be checked only when they are loaded.

    Raises:
        ConfigError: as :func:`load_language_model`.
    """
    loading_options(None)  # ZeRO-3 may have trained the last model in this process, and would divide the next
    is_folder = Path(model.name).is_dir()
    options = {"revision": model.revision, "trust_remote_code": model.trust_remote_code}
    config = load_model_config(model)
    if getattr(config, "quantization_config", None) is not None or is_gguf(model.name):
        return False
    try:
        with readable(f"{key}: the weights of {model.name!r} cannot be loaded"):
            loaded, report = _load(model.name, options | {"local_files_only": not is_folder, "device_map": "meta"})
    except ConfigError:
        if not is_folder:
            return False
        raise
    except Exception:  # code that comes with a model may not know a device without memory
        return False
    _check(f"{key}: {model.name!r}", type(loaded).__name__, report)
    return True


def shapes(model: ModelConfig) -> PreTrainedModel:
    """The model without its weights, on the meta device: its layers, and their shapes."""
    import torch

    config = load_model_config(model)
    with torch.device("meta"):
        made: PreTrainedModel = auto_class(config).from_config(config, trust_remote_code=model.trust_remote_code)
    return made


def merged_model(model: ModelConfig, adapter: Path, needed: str) -> PreTrainedModel:
    """The base model with a saved adapter merged into it, by plain PEFT, in float32 on the CPU.

    Args:
        needed: what needs it, and whose adapter it is, as a message begins that says that PEFT cannot merge it.

    Raises:
        ConfigError: the base model cannot be loaded, the adapter's file lacks tensors, or PEFT cannot merge it.
    """
    from peft import PeftModel

    base = load_language_model(
        model.name, revision=model.revision, trust_remote_code=model.trust_remote_code, dtype="float32"
    )
    try:
        with whole_adapter(str(adapter)):
            peft: Any = PeftModel.from_pretrained(base, str(adapter))
        merged: PreTrainedModel = peft.merge_and_unload(safe_merge=True)
    except ConfigError:
        raise
    except (ValueError, NotImplementedError, AttributeError) as error:  # PEFT has no error of its own for it
        raise ConfigError(f"{needed} cannot be merged into the model: {error}") from None
    return merged


@contextlib.contextmanager
def whole_adapter(place: str) -> Iterator[None]:
    """Within it, PEFT's warning of tensors that an adapter's file lacks is an error.

    Args:
        place: where the adapter comes from, for the message.

    Raises:
        ConfigError: the file lacks tensors of the adapter; the message names them.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")
        try:
            yield
        except UserWarning as error:
            raise ConfigError(f"{place}: {error}") from None


def _load(name: str | Path, options: dict[str, Any]) -> tuple[PreTrainedModel, dict[str, Collection[Any]]]:
    """The model, and transformers' report of what it did not find in the files."""
    from transformers import AutoConfig, AutoModelForCausalLM, GgufConfig

    place, file = located(name)
    if file:
        options = options | file | {"quantization_config": GgufConfig(dequantize=True)}
        kind: Any = AutoModelForCausalLM
    else:
        reading = {key: options[key] for key in HUB_OPTIONS if key in options}
        kind = auto_class(AutoConfig.from_pretrained(place, **reading))
    loaded: Any = kind.from_pretrained(place, output_loading_info=True, ignore_mismatched_sizes=True, **options)
    if file:
        sha256, types = file_facts(Path(name))["sha256"], weight_types(Path(name))
        loaded[0].config.converted_from = Origin(file=Path(name).name, sha256=sha256, weights=types)
        loaded[0].name_or_path = str(name)
    return loaded


def _check(place: str, architecture: str, report: Mapping[str, Collection[Any]]) -> None:
    """Raise ConfigError if tensors are missing or have another shape, from transformers' report of a loading."""
    missing, unused = sorted(report["missing_keys"]), sorted(report["unexpected_keys"])
    other = [f"{name} {list(there)}, not {list(wanted)}" for name, there, wanted in sorted(report["mismatched_keys"])]
    instead = f"; the files have instead: {_listed(unused)}" if unused else ""
    right = "a whole model, or the config.json that belongs to these weights, is needed"
    if missing:
        raise ConfigError(
            f"{place}: its files lack {len(missing)} tensors of {architecture}, which would be random: "
            f"{_listed(missing)}{instead}; {right}"
        )
    if other:
        raise ConfigError(
            f"{place}: {len(other)} tensors are not of the shape of {architecture}: {_listed(other)}; {right}"
        )
    if unused:
        logger.warning(
            "%s: %s does not use %d tensors of its files: %s", place, architecture, len(unused), _listed(unused, 3)
        )


def _listed(names: Iterable[str], most: int = NAMED) -> str:
    names = list(names)
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest
