"""The pictures that a conversation shows: data URLs, as OpenAI's parts of a message have them."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Sequence
from typing import Any

from holdfast.api.task import PICTURE
from holdfast.deploy.openai.errors import RequestError
from holdfast.models.pictures import LARGEST, BadPictureError, Picture, look_once

DATA_URL = re.compile(r"data:image/[\w.+-]+;base64,", re.IGNORECASE)
KIND = "image_url"


def take_images(messages: Sequence[dict[str, Any]], most: int) -> tuple[list[dict[str, Any]], list[Picture]]:
    """Read the pictures of messages.

    Args:
        most: pictures that a request may show; 0: the model reads text alone.

    Returns:
        the messages, with :data:`~holdfast.api.task.PICTURE` as text in the place of each picture, and the pictures in
        order, which are known as long as they are held.

    Raises:
        RequestError: a picture cannot be used, or there are too many, or they have too many pixels together.
    """
    shown: list[Picture] = []

    def text_of(part: Any, place: str) -> Any:
        if not isinstance(part, dict) or part.get("type") != KIND:
            return part
        if not most:
            raise _refused(f"{place}: is a picture, and this model reads text alone")
        if len(shown) == most:
            raise _refused(f"{place}: is picture {most + 1} of the request; at most {most}")
        shown.append(_picture(part, place))
        if (pixels := sum(one.width * one.height for one in shown)) > LARGEST:
            raise _refused(f"{place}: the pictures have {pixels} pixels by now; at most {LARGEST} together")
        return {"type": "text", "text": PICTURE}

    read = []
    for turn, message in enumerate(messages, 1):
        content, place = message.get("content"), f"messages, turn {turn}: content, part"
        if isinstance(content, list):
            content = [text_of(part, f"{place} {number}") for number, part in enumerate(content, 1)]
        read.append(message | {"content": content} if "content" in message else message)
    return read, shown


def _picture(part: dict[str, Any], place: str) -> Picture:
    image = part.get(KIND)
    if not isinstance(image, dict) or not isinstance(image.get("url"), str):
        raise _refused(f"{place}: must be {{type: {KIND}, {KIND}: {{url: ...}}}}")
    if other := sorted({*part} - {"type", KIND} | {*image} - {"url", "detail"}):
        raise _refused(f"{place}: {other[0][:80]}: is not used by this model; leave it out")
    if image.get("detail") not in (None, "auto"):
        raise _refused(f"{place}: detail: the model's own processor sets the size; leave it out")
    url = image["url"]
    if not DATA_URL.match(url):
        raise _refused(f"{place}: {url[:80]!r} is not fetched here; give a data URL (data:image/png;base64,...)")
    try:
        return look_once(base64.b64decode(url.partition(",")[2], validate=True), "the picture")
    except binascii.Error as error:
        raise _refused(f"{place}: its data URL is no base64: {error}") from None
    except BadPictureError as error:
        raise _refused(f"{place}: {error}") from None


def _refused(message: str) -> RequestError:
    return RequestError(message, "messages")
