"""Models that see: the processor that makes pictures into inputs, and forward passes of rows that show pictures."""

from __future__ import annotations

import inspect
import io
import shutil
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from holdfast.config.model import ModelConfig
from holdfast.engines.pieces import is_divided
from holdfast.engines.process import Process
from holdfast.errors import ConfigError
from holdfast.models.head import base
from holdfast.models.kinds import sees
from holdfast.models.pictures import HIGHEST_PLACE, Picture, know, number_of, pictures_in, place_token
from holdfast.models.pretrained import hub_options, readable

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

_OPEN, _CLOSE = "\ufdd4", "\ufdd5"  # noncharacters around what a processor writes for a picture
TYPES = ("mm_token_type_ids", "token_type_ids")
"""Inputs of a model that say which tokens are a picture's."""
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")
"""What transformers reads a processor from, beside its tokenizer and its chat template."""


class Sight:
    """What a model needs to see: how its processor writes pictures into a text, and makes pixels into inputs.

    Attributes:
        processor: transformers' processor of the model.
        placeholder: what stands in a text where a picture is to be put.
        image_token_id: the token that the model fills with parts of a picture.
    """

    def __init__(self, processor: Any, config: PretrainedConfig):
        """Raises ConfigError if the model's configuration or its processor names no image token."""
        token = _image_token(config)
        if token is None or getattr(processor, "image_token", None) is None:
            raise ConfigError(f"model.name: the configuration of this {config.model_type} names no image token")
        self.processor, self.image_token_id = processor, token
        self.placeholder = str(processor.image_token)
        self.image_token = str(processor.tokenizer.convert_ids_to_tokens(self.image_token_id))
        self.written = lru_cache(maxsize=4096)(self._written)

    def __deepcopy__(self, memo: Any) -> Sight:
        return self

    def _written(self, sizes: tuple[tuple[int, int], ...]) -> tuple[str, ...]:
        """What the processor writes for the pictures of a row, which depends on their sizes alone.

        Args:
            sizes: (width, height) of each, in pixels.
        """
        from PIL import Image

        text = "".join(f"{_OPEN}{self.placeholder}{_CLOSE}" for _ in sizes)
        recorder = _Recorder(self.processor.tokenizer)
        self.processor.tokenizer = recorder
        try:
            self.processor(text=[text], images=[[Image.new("RGB", size) for size in sizes]])
        finally:
            self.processor.tokenizer = recorder.tokenizer
        return tuple(part.partition(_OPEN)[2] for part in recorder.text.split(_CLOSE)[:-1])

    def places(self, written: str) -> int:
        """Places of a picture's parts in what :attr:`written` gave for it."""
        return written.count(self.image_token)

    def pixels(self, rows: Sequence[Sequence[Picture]]) -> dict[str, Tensor]:
        """A model's inputs of the pictures of some rows, each of which has some, beside its tokens."""
        images = [[picture.pixels() for picture in row] for row in rows]
        return dict(self.processor.image_processor(images, return_tensors="pt"))

    def batch(self, model: Any, ids: Tensor) -> dict[str, Any]:
        """The arguments of a forward pass of rows: ``input_ids``, and the inputs of the pictures that they show.

        Args:
            ids: int64 [rows, seq]; places of pictures are negative.
        """
        inner = base(model)
        takes = inspect.signature(inner.forward).parameters
        places = ids <= HIGHEST_PLACE
        inputs: dict[str, Any] = {"input_ids": ids.masked_fill(places, self.image_token_id)}
        rows = [row for row in map(pictures_in, _rows(ids, places)) if row]
        if rows:
            pixels = {key: torch.as_tensor(value) for key, value in self.pixels(rows).items() if key in takes}
            inputs |= {
                key: value.to(ids.device, inner.dtype if value.is_floating_point() else None)
                for key, value in pixels.items()
            }
        if rows or inner.training:
            inputs |= {key: places.to(ids.dtype) for key in TYPES if key in takes}
        return inputs

    def blank(self) -> list[int]:
        """The tokens of a row that shows an empty picture."""
        from PIL import Image

        file = io.BytesIO()
        Image.new("RGB", (28, 28)).save(file, "PNG")
        content = file.getvalue()
        picture = know(Picture(number_of(content), 28, 28, content, "an empty picture"))
        [written] = self.written((picture.size,))
        ids = self.processor.tokenizer(written, add_special_tokens=False)["input_ids"]
        return [place_token(picture, 0) if token == self.image_token_id else token for token in ids]


def _image_token(config: PretrainedConfig) -> int | None:
    """The token that a model fills with parts of a picture, as its configuration names it."""
    tokens = (getattr(config, key, None) for key in ("image_token_id", "image_token_index"))
    return next((int(token) for token in tokens if token is not None), None)


class _Recorder:
    """A tokenizer that keeps the text that it is given."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer, self.text = tokenizer, ""

    def __call__(self, text: Any, **options: Any) -> Any:
        [self.text] = text
        return self.tokenizer(text, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)


def _rows(ids: Tensor, places: Tensor) -> Iterable[list[int]]:
    """The places of each row, row by row."""
    for row, shown in zip(ids, places, strict=True):
        yield row[shown].tolist()


def load_sight(model: ModelConfig, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> Sight | None:
    """The processor of a model that sees; None for one that reads text alone.

    A tokenizer without a chat template gets that of the processor.

    Raises:
        ConfigError: the model's folder holds no processor, or one that cannot be used.
    """
    if not sees(config):
        return None
    with readable(f"model.name: {model.name!r} has no processor for pictures that can be read"):
        processor = _processor(model, config, tokenizer)
    if not tokenizer.chat_template and getattr(processor, "chat_template", None):
        tokenizer.chat_template = processor.chat_template
    processor.tokenizer = tokenizer
    return Sight(processor, config)


def _processor(model: ModelConfig, config: PretrainedConfig, tokenizer: Any) -> Any:
    """transformers' processor; without torchvision, which videos need, one without its part for videos."""
    import transformers
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES
    from transformers.utils import is_torchvision_available

    options = hub_options(model)
    if is_torchvision_available() or config.model_type not in PROCESSOR_MAPPING_NAMES:
        return transformers.AutoProcessor.from_pretrained(model.name, **options)
    whole = getattr(transformers, PROCESSOR_MAPPING_NAMES[config.model_type])

    class WithoutVideo(whole):  # type: ignore[misc, valid-type]
        def check_argument_for_proper_class(self, name: str, argument: Any) -> None:
            pass

        @classmethod
        def _get_arguments_from_pretrained(cls, folder: Any, *args: Any, **kwargs: Any) -> list[Any]:
            found = {
                "image_processor": transformers.AutoImageProcessor.from_pretrained(folder, **options),
                "tokenizer": tokenizer,
            }
            return [found.get(name) for name in whole.get_attributes()]

    WithoutVideo.__name__ = whole.__name__
    return WithoutVideo.from_pretrained(model.name, **options)


def copy_processor(model: ModelConfig, folder: Path) -> None:
    """Copy the files of a model's processor, as they are, into a folder that has the tokenizer with its chat template.

    A processor that was loaded without its part for videos would not write that part.

    Args:
        model: of the hub, or a folder; one that reads text alone has none of these files.
    """
    from transformers.utils import cached_file

    for name in PROCESSOR_FILES:
        quiet = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
        if (file := cached_file(model.name, name, revision=model.revision, **quiet)) is not None:
            shutil.copyfile(file, folder / name)


# --- calls ---


def callable_with_pictures(model: Any, sight: Sight | None) -> Any:
    """Let a model be called with rows that show pictures; one that reads text alone stays as it is."""
    if sight is not None and sight_of(model) is None:
        inner = base(model)
        inner._holdfast_sight = sight
        inner.register_forward_pre_hook(_see, with_kwargs=True)
        if inner.base_model is not inner:  # which some callers call by itself, for its hidden states
            inner.base_model._holdfast_sight = sight
            inner.base_model.register_forward_pre_hook(_see_places, with_kwargs=True)
    return model


def never_written(model: Any) -> dict[str, list[int]]:
    """The settings of generation by which a model that sees writes no image token, which is no text."""
    config = base(model).config
    token = _image_token(config) if sees(config) else None
    return {} if token is None else {"suppress_tokens": [token]}


def sight_of(model: Any) -> Sight | None:
    """How a model sees; None where it reads text alone, or was not made callable with pictures."""
    return getattr(base(model), "_holdfast_sight", None)


def _see(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """The arguments of the model's own forward pass, for rows."""
    seen = _see_places(module, args, kwargs)
    ids = args[0] if args else kwargs.get("input_ids")
    if seen is not None or not isinstance(ids, Tensor):
        return seen
    if any(kwargs.get(key) is not None for key in ("pixel_values", "past_key_values")):
        return None
    if _must_go_along(module):
        _show_blank(module)
    if not module.training:
        return None
    return args[1:], kwargs | module._holdfast_sight.batch(module, ids)


def _see_places(
    module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """The arguments of a forward pass of rows that show pictures; None where none does."""
    ids = args[0] if args else kwargs.get("input_ids")
    if not isinstance(ids, Tensor) or not bool((ids <= HIGHEST_PLACE).any()):
        return None
    return args[1:], kwargs | module._holdfast_sight.batch(module, ids)


def _must_go_along(model: Any) -> bool:
    """Whether a pass without pictures must go through the parts that see, since other processes do."""
    return is_divided(model) or (Process.this().world > 1 and model.training)


def _show_blank(model: Any) -> None:
    """Let the next pass go through the parts that see, with an empty picture that has no part in what it makes."""
    embeddings, sight = model.get_input_embeddings(), model._holdfast_sight
    inputs = sight.batch(model, torch.tensor([sight.blank()], device=model.device))
    takes = inspect.signature(model.get_image_features).parameters
    pixels = {key: value for key, value in inputs.items() if key in takes}

    def add_nothing(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        hook.remove()
        nothing = [0.0 * part.sum() for part in _tensors(model.get_image_features(**pixels))]
        return output + torch.stack(nothing).sum().to(output.dtype)

    hook = embeddings.register_forward_hook(add_nothing)


def _tensors(features: Any) -> Iterable[Tensor]:
    if isinstance(features, Tensor):
        yield features
    elif isinstance(features, dict):
        for part in features.values():
            yield from _tensors(part)
    elif isinstance(features, list | tuple):
        for part in features:
            yield from _tensors(part)
