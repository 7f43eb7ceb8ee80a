"""Images beside a message's text, in the forms that the vendors' users write them. Stores and sends nothing.

An image is shown to the model in its turn; what is remembered of that turn is its text.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping, Sequence
from typing import Any

from .errors import InvalidInput
from .types import Image

__all__ = ["split"]

#: What all vendors read.
MEDIA_TYPES = ("image/png", "image/jpeg", "image/gif", "image/webp")
_DATA = re.compile(r"data:([\w/+.-]+);base64,(.*)", re.DOTALL)


def split(parts: Sequence[Any]) -> tuple[str, tuple[Image, ...]]:
    """A message's content parts as its text and its images.

    Text: a str, or ``{"type": "text" | "input_text", "text"}``. Images: an `Image`; OpenAI's ``image_url`` and
    ``input_image``; Anthropic's ``image`` with a ``source`` of base64 data or a url. Raises `InvalidInput` for anything
    else.
    """
    texts: list[str] = []
    images: list[Image] = []
    for part in parts:
        if isinstance(part, str):
            texts.append(part)
        elif isinstance(part, Image):
            images.append(_checked(part))
        elif isinstance(part, Mapping) and part.get("type") in ("text", "input_text"):
            if not isinstance(part.get("text"), str):
                raise InvalidInput("a text part of a message has no text")
            texts.append(part["text"])
        elif isinstance(part, Mapping) and part.get("type") in ("image_url", "input_image"):
            given = part.get("image_url")
            images.append(_of_address(given.get("url") if isinstance(given, Mapping) else given))
        elif isinstance(part, Mapping) and part.get("type") == "image":
            images.append(_of_source(part.get("source")))
        else:
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise InvalidInput(f"a part of a message is {str(kind)[:40]!r}: give text or images")
    return "\n".join(texts), tuple(images)


def _of_source(source: Any) -> Image:
    if isinstance(source, Mapping) and source.get("type") == "url":
        return _of_address(source.get("url"))
    if isinstance(source, Mapping) and source.get("type") == "base64":
        data, media_type = source.get("data"), source.get("media_type")
        if isinstance(data, str) and isinstance(media_type, str):
            return _checked(Image(data=data, media_type=media_type))
    raise InvalidInput("an image's source is base64 data with its media_type, or a url")


def _of_address(url: Any) -> Image:
    if not isinstance(url, str):
        raise InvalidInput("an image's address is a str: https://… or data:image/png;base64,…")
    if match := _DATA.fullmatch(url):
        return _checked(Image(data=match[2], media_type=match[1]))
    return _checked(Image(url=url))


def _checked(image: Image) -> Image:
    if image.data is None:
        if image.url is None or not image.url.startswith(("https://", "http://")):
            raise InvalidInput("an image has base64 data, or an address that begins with https://")
        return image
    if image.media_type not in MEDIA_TYPES:
        raise InvalidInput(f"an image is of type {str(image.media_type)[:40]!r}: give one of {', '.join(MEDIA_TYPES)}")
    try:
        if not base64.b64decode(image.data, validate=True):
            raise InvalidInput("an image holds no bytes")
    except (binascii.Error, ValueError) as error:
        raise InvalidInput(f"an image's data is not base64: {error}") from error
    return image
