"""A model's LoRA adapters as plain tensors: read and exchange them, and set their rank."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from holdfast.engines.pieces import full
from holdfast.errors import ConfigError

if TYPE_CHECKING:
    from peft import LoraConfig

Factors = dict[str, Tensor]
"""An adapter's factors by layer: ``LAYER.lora_A`` [rank, in] and ``LAYER.lora_B`` [out, rank]."""

TRAINED = "default"
"""Name of the adapter that is trained and saved: PEFT's name for the first adapter of a model."""

SHAPE = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora")
"""The keys of an adapter's configuration that a method may change from stage to stage."""


def plain_lora(model: nn.Module, method: str) -> LoraConfig:
    """The configuration of a model's one adapter.

    Raises:
        ConfigError: the model has no adapter or several, something else than LoRA's factors is trained, or stacked
            experts are adapted.
    """
    from peft import PeftModel, PeftType

    configs = model.peft_config if isinstance(model, PeftModel) else {}
    if list(configs) != [TRAINED] or configs[TRAINED].peft_type != PeftType.LORA:
        adapters = ", ".join(f"{name!r} ({config.peft_type.value})" for name, config in configs.items()) or "none"
        raise ConfigError(
            f"method {method!r}: needs a model with one LoRA adapter that is called {TRAINED!r}, as "
            f"peft.get_peft_model(model, peft.LoraConfig(...)) makes it; the adapters of this model: {adapters}"
        )
    config: Any = configs[TRAINED]
    if config.target_parameters:  # whose factors hold those of all experts, rank by rank
        raise ConfigError(
            f"method {method!r}: needs adapters of linear layers, not of stacked experts; leave target_parameters out, "
            "and name the layers to adapt in the tuner's target_modules"
        )
    layers = factors(model)
    suffix = f".{TRAINED}.weight"
    for name, p in model.named_parameters():
        if p.requires_grad and name.removesuffix(suffix) not in layers:
            raise ConfigError(
                f"method {method!r}: adds up the updates of plain LoRA adapters, but {name} is trained, too; leave out "
                "the tuner's options that make it so (use_dora, bias, lora_bias, modules_to_save, embeddings as "
                "target_modules, ...)"
            )
    if config.init_lora_weights not in (True, "gaussian"):
        raise ConfigError(
            f"method {method!r}: tuner.init_lora_weights is {config.init_lora_weights!r}; a new adapter must begin at "
            "an update of zero without a change of the model's own weights: leave it out, or use 'gaussian'"
        )
    return config


def factors(model: nn.Module, adapter: str = TRAINED) -> Factors:
    """The factors of a LoRA adapter: views of the parameters, or whole copies where an engine divides them."""
    suffix = f".{adapter}.weight"
    return {
        name.removesuffix(suffix): full(p).detach()
        for name, p in model.named_parameters()
        if name.endswith((f".lora_A{suffix}", f".lora_B{suffix}"))
    }


def scalings(model: nn.Module, adapter: str = TRAINED) -> dict[str, float]:
    """The factor that each layer's B is multiplied by, by its name in :data:`Factors`."""
    layers: Any = ((name, module) for name, module in model.named_modules() if hasattr(module, "lora_B"))
    return {f"{name}.lora_B": layer.scaling[adapter] for name, layer in layers}


def padded(values: Factors, rank: int) -> Factors:
    """The same update at a higher rank: A gets rows of zeros, B columns of zeros."""

    def grown(key: str, w: Tensor) -> Tensor:
        rows, columns = (rank - len(w), 0) if key.endswith("lora_A") else (0, rank - w.shape[1])
        return nn.functional.pad(w, (0, columns, 0, rows))

    return {key: grown(key, w) for key, w in values.items()}


def exchange_adapters(model: Any, adapters: Mapping[str, tuple[LoraConfig, Factors | None]]) -> None:
    """Replace all adapters of a PEFT model; all new ones are active, and only ``default`` is trained.

    The parameters are new ones, so an optimizer over the old ones must be replaced, too.

    Args:
        adapters: by name, the configuration and factors of each; without factors, PEFT initialises the adapter from
            torch's random state (:func:`seeded`).
    """
    for name in reversed(list(model.peft_config)):
        model.delete_adapter(name)
    for name, (config, values) in adapters.items():
        model.add_adapter(name, replace(config, inference_mode=False))
        if values is not None:
            for key, tensor in factors(model, name).items():
                tensor.copy_(values[key])
    model.set_adapter(next(iter(adapters)))
    model.base_model.set_adapter(list(adapters))
    model.set_requires_grad([name for name in adapters if name != TRAINED], False)
    model.train(model.training)  # new modules are in training mode at first


def of_rank(config: LoraConfig, rank: int) -> LoraConfig:
    """The configuration of an adapter with this rank in every layer and without scaling: its update is B A."""
    return replace(config, r=rank, lora_alpha=rank, rank_pattern={}, alpha_pattern={}, use_rslora=False)


def times_rank(config: LoraConfig, count: int, parts: int = 1) -> LoraConfig:
    """The configuration with ``count / parts`` times the rank in every layer and the same scaling."""

    def grown(rank: int) -> int:
        assert rank * count % parts == 0, f"rank {rank} is not that of {parts} equal adapters"
        return rank * count // parts

    def scaled(alpha: float) -> float:
        return alpha * math.sqrt(count / parts) if config.use_rslora else alpha * count / parts

    return replace(
        config,
        r=grown(config.r),
        lora_alpha=scaled(config.lora_alpha),
        rank_pattern={name: grown(rank) for name, rank in config.rank_pattern.items()},
        alpha_pattern={name: scaled(alpha) for name, alpha in config.alpha_pattern.items()},
    )


@contextmanager
def seeded(chance: random.Random) -> Iterator[None]:
    """Seed torch's random numbers from ``chance``, and restore torch's state at the end."""
    with torch.random.fork_rng():
        torch.manual_seed(chance.getrandbits(63))
        yield
