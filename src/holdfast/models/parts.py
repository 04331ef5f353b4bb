"""The parts of a model that sees: its language model, its vision tower, and the projector between them."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from torch import nn

from holdfast.errors import ConfigError
from holdfast.models.kinds import Target, sees

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROJECTORS = re.compile(r"(^|\.)(multi_modal_projector|connector|image_newline|merger|deepstack_merger_list)(\.|$)")
"""transformers' names of what turns a picture's features into those of tokens; some lie in the vision tower."""


class Parts:
    """To which part of a model that sees its modules belong.

    Args:
        model: one that sees.
    """

    def __init__(self, model: PreTrainedModel):
        self._model, tower = model, model.get_encoder("image")
        self._towers = [name for name, module in model.named_modules() if module is tower and module is not model]

    def of(self, name: str) -> Target:
        """The part of a module or a parameter; the head belongs to the language model."""
        if PROJECTORS.search(name):
            return "projector"
        inside = any(name == tower or name.startswith(f"{tower}.") for tower in self._towers)
        return "vision" if inside else "language"

    def outside(self, target: Target) -> str:
        """A regular expression of the layers that are not in a part, for PEFT's ``exclude_modules``.

        Raises:
            ConfigError: the part has no layer that could be adapted.
        """
        modules = self._model.named_modules()
        layers = {name: self.of(name) for name, module in modules if isinstance(module, nn.Linear | nn.Conv2d)}
        if target not in layers.values():
            raise ConfigError(
                f"target: the {target} of {type(self._model).__name__} has no linear layer; tuner full would do"
            )
        left: dict[str, None] = {}
        for name, part in layers.items():
            if part != target:
                pieces = name.split(".")
                around = (".".join(pieces[:count]) for count in range(1, len(pieces) + 1))
                left |= dict.fromkeys([next(one for one in around if target not in _within(layers, one))])
        return "|".join(rf"{re.escape(name)}(\..*)?" for name in left)


def _within(layers: dict[str, Target], around: str) -> set[Target]:
    return {part for name, part in layers.items() if name == around or name.startswith(f"{around}.")}


def trained_part(model: PreTrainedModel, target: Target) -> None:
    """Train the weights of a part alone; of a model that reads text alone, all of them."""
    parts = Parts(model) if sees(model.config) and target != "all" else None
    for name, p in model.named_parameters():
        p.requires_grad_(parts is None or parts.of(name) == target)
