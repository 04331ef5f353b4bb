"""Pictures, known by their content, and the tokens by which rows hold them.

A row holds a picture in its ``input_ids``. Each place that the model fills with a part of the picture has, instead of
the model's image token, a negative number that is made of the picture's content. So a row of tokens says all: rows that
show other pictures differ, and memories, caches and prompts need no further column. Labels never hold such numbers. A
forward pass puts the image token in their place and reads the pixels (:mod:`holdfast.models.sight`).
"""

from __future__ import annotations

import base64
import hashlib
import io
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated
from weakref import WeakValueDictionary

from pydantic import AfterValidator

from holdfast.errors import ConfigError, DataError

if TYPE_CHECKING:
    from PIL.Image import Image

LARGEST = 64_000_000
"""Pixels of a picture, at most."""

HIGHEST_PLACE = -(2**32)
"""Tokens of pictures are this or less: far below -100, and any other mark."""
SENT = ("PNG", "JPEG", "WEBP", "GIF")
"""Formats that OpenAI's interface names."""
_TURNED = (5, 6, 7, 8)  # EXIF orientations whose width and height change places
_ORIENTATION = 0x0112


class BadPictureError(Exception):
    """The reason why a picture cannot be used."""


class UnreadablePictureError(BadPictureError):
    """The reason why a picture's file cannot be read."""


@dataclass(frozen=True)
class Picture:
    """A picture, of which the pixels are read when they are needed.

    Attributes:
        number: 60 bits of the SHA-256 of its file.
        width: in pixels, as it is shown.
        height: in pixels, as it is shown.
        source: the file, or its content.
        name: what messages call it.
    """

    number: int
    width: int
    height: int
    source: Path | bytes = field(repr=False)
    name: str = ""

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels."""
        return self.width, self.height

    @property
    def size_of_file(self) -> int:
        """In bytes; 0 where the file is gone."""
        if isinstance(self.source, bytes):
            return len(self.source)
        return self.source.stat().st_size if self.source.exists() else 0

    def content(self) -> bytes:
        """The content of its file.

        Raises:
            DataError: the file cannot be read, or is another one now.
        """
        if isinstance(self.source, bytes):
            return self.source
        try:
            content = self.source.read_bytes()
        except OSError as error:
            raise DataError(f"{self.source}: the picture cannot be read any more: {error.strerror}") from None
        if number_of(content) != self.number:
            raise DataError(f"{self.source}: the picture has changed since its row was read; start again")
        return content

    def pixels(self) -> Image:
        """The picture, decoded, in RGB and turned as its camera says.

        Raises:
            DataError: as :meth:`content`.
        """
        from PIL import Image, ImageOps

        with Image.open(io.BytesIO(self.content())) as image:
            return ImageOps.exif_transpose(image).convert("RGB")


def data_url(picture: Picture) -> str:
    """The picture's file as a data URL: as it is where all servers read its format, or else as PNG.

    Raises:
        DataError: as :meth:`Picture.content`.
    """
    content = picture.content()
    with _opened(content) as image:
        kind = image.format
    if kind not in SENT:
        file, kind = io.BytesIO(), "PNG"
        picture.pixels().save(file, kind)
        content = file.getvalue()
    return f"data:image/{kind.lower()};base64,{base64.b64encode(content).decode()}"


def number_of(content: bytes) -> int:
    """The number of a picture with this content."""
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "big") >> 4


# --- the pictures of this process ---

_KNOWN: dict[int, Picture] = {}
_SHOWN: WeakValueDictionary[int, Picture] = WeakValueDictionary()
_OPENING = threading.Lock()  # Pillow's limit is a global


def know(picture: Picture) -> Picture:
    """Let rows of this process show a picture; of two files with one content, the last is read."""
    _KNOWN[picture.number] = picture
    return picture


def forget(pictures: Iterable[Picture]) -> None:
    """Let go of pictures that no row shows any more."""
    for picture in pictures:
        _KNOWN.pop(picture.number, None)


def known(number: int) -> Picture:
    """The picture with this number.

    Raises:
        DataError: no data that this process has read hold it.
    """
    picture = _SHOWN.get(number) or _KNOWN.get(number)
    if picture is None:
        raise DataError(
            f"a row shows picture {number:015x} (60 bits of its file's SHA-256), which the data of this run do not "
            "hold any more; put the file back where it was"
        )
    return picture


def look_at(source: Path | bytes, name: str = "") -> Picture:
    """Read the head of a picture, and decode it once to see that it is whole.

    Args:
        source: its file, or the content of one.
        name: what messages call it; of a file, its path.

    Raises:
        BadPictureError: it is missing, broken, too large, has several frames, or more than 8 bits a colour.
        ConfigError: Pillow is not installed.
    """
    _pillow()
    name = name or (str(source) if isinstance(source, Path) else "")
    try:
        content = source if isinstance(source, bytes) else source.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: no path has such characters
        raise UnreadablePictureError(f"{name!r} cannot be read: {getattr(error, 'strerror', error)}") from None
    number = number_of(content)
    if (same := _KNOWN.get(number)) is not None:
        return know(replace(same, source=source, name=name))
    return know(_checked(number, content, source, name))


def look_once(content: bytes, name: str) -> Picture:
    """As :func:`look_at`, for a picture that is known only as long as somebody holds what this returns."""
    number = number_of(content)
    same = _SHOWN.get(number) or _KNOWN.get(number)
    if same is None:
        _pillow()
        same = _checked(number, content, content, name)
    return _SHOWN.setdefault(number, replace(same, source=content, name=name))


def _checked(number: int, content: bytes, source: Path | bytes, name: str) -> Picture:
    """A picture that Pillow can read."""
    from PIL import UnidentifiedImageError

    try:
        with _opened(content) as image:
            width, height = image.size
            if width * height > LARGEST:
                raise BadPictureError(
                    f"{name!r} has {width} x {height} pixels, more than {LARGEST // 10**6} millions; make it smaller"
                )
            if (frames := getattr(image, "n_frames", 1)) > 1:
                raise BadPictureError(f"{name!r} is animated ({frames} frames); save the frame that is meant")
            if image.mode in ("I", "F") or image.mode.startswith("I;"):
                raise BadPictureError(
                    f"{name!r} has more than 8 bits a colour (Pillow's mode {image.mode}), of which models see white "
                    "alone; save it with 8 bits"
                )
            if image.getexif().get(_ORIENTATION) in _TURNED:
                width, height = height, width
            image.load()
    except UnidentifiedImageError:
        raise BadPictureError(f"{name!r} is no picture that Pillow can read") from None
    except BadPictureError:
        raise
    except Exception as error:  # of a broken file, Pillow's decoders raise whatever they meet
        raise BadPictureError(f"{name!r} is broken: {error}") from None
    return Picture(number, width, height, source, name)


def _opened(content: bytes) -> Image:
    """A picture whose head is read, however large it is: what is too large is told by who asks."""
    from PIL import Image

    with _OPENING:
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            return Image.open(io.BytesIO(content))
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def _pillow() -> None:
    try:
        import PIL  # noqa: F401
    except ImportError:
        raise ConfigError("pictures: reading them needs Pillow: pip install 'holdfast[images]'") from None


# --- tokens ---


def _row_token(token: int) -> int:
    if HIGHEST_PLACE < token < 0:
        raise ValueError("must be a token of the model, or a place of a picture")
    return token


RowToken = Annotated[int, AfterValidator(_row_token)]
"""A token in a file of rows."""


def place_token(picture: Picture, order: int) -> int:
    """What stands in ``input_ids`` at each place of a picture.

    Args:
        order: which picture of its row it is, from 0. Neighbours differ, even if they show the same.
    """
    return HIGHEST_PLACE - 2 * picture.number - order % 2


def is_place(token: int) -> bool:
    """Whether a token is a place of a picture."""
    return token <= HIGHEST_PLACE


def pictures_in(tokens: Sequence[int]) -> list[Picture]:
    """The pictures of a row, in order.

    Raises:
        DataError: the data of this process do not hold one of them.
    """
    shown, last = [], 0
    for token in tokens:
        if token <= HIGHEST_PLACE:
            if token != last:
                shown.append(known((HIGHEST_PLACE - token) // 2))
            last = token
    return shown
