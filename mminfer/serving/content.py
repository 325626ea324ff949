"""From a request's messages to typed ones: images are decoded here, within limits, from where that is allowed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from PIL import Image

from mminfer.errors import InputError
from mminfer.inputs.images import image_size, load_image_bytes
from mminfer.inputs.parts import ImagePart, Message, Part, TextPart
from mminfer.inputs.remote import fetch
from mminfer.inputs.sources import data_url_bytes
from mminfer.serving.budget import Share
from mminfer.serving.errors import RequestError
from mminfer.serving.limits import ServerSettings
from mminfer.serving.schema import ChatMessage, ChatRequest, ImageContent

ROLES = {"developer": "system"}


@dataclass(frozen=True)
class Chat:
    """The messages of a request.

    Args:
        messages: typed, their images decoded.
        digests: of each message, one for each part: of a text's words or an image's bytes.
    """

    messages: tuple[Message, ...]
    digests: tuple[tuple[bytes, ...], ...]


class SentImage(ImagePart):
    """An image whose header was checked. It is decoded whenever somebody looks at it, since what is known is not.

    Args:
        content: of its file.
        where: in the request.
        server: says how large it may be.
    """

    def __init__(self, content: bytes, where: str, server: ServerSettings) -> None:
        self._set(content, where, server.limits.pixels)
        try:
            width, height = image_size(content, where, server.limits.pixels)
        except InputError:
            raise self._refusal from None
        digest = hashlib.sha256(b"image" + content).digest()
        self._set(content, where, server.limits.pixels, 3 * width * height, digest)

    def _set(self, *facts: Any) -> None:
        vars(self)["_facts"] = facts  # past the dataclass, which is frozen

    @property
    def digest(self) -> bytes:
        """Of its file's bytes."""
        return bytes(vars(self)["_facts"][4])

    @property
    def decoded_bytes(self) -> int:
        """What it takes once it is decoded."""
        return int(vars(self)["_facts"][3])

    @property
    def image(self) -> Image.Image:
        content, where, pixels, *_ = vars(self)["_facts"]
        try:
            return load_image_bytes(content, where, pixels)
        except InputError:
            raise self._refusal from None

    @property
    def _refusal(self) -> RequestError:
        _, where, pixels, *_ = vars(self)["_facts"]
        message = f"{where}: no image that can be read, or of more than {pixels} pixels"
        return RequestError(400, message, param=where, code="invalid_image")


def read_chat(request: ChatRequest, server: ServerSettings, share: Share) -> Chat:
    """Checks the messages of a request; images are looked at, but not decoded.

    Args:
        request: as it was sent.
        server: what the operator allows.
        share: what it holds of all memory; what is fetched is taken from it.

    Raises:
        RequestError: there are too many images, one is too large, damaged or from where none is taken, or the messages
            are in no order that can be answered.
    """
    roles = [ROLES.get(message.role, message.role) for message in request.messages]
    if "system" in roles[1:] or roles[-1] != "user":
        raise RequestError(
            400, "messages: wanted one system message at most, in front, and the user's at the end", param="messages"
        )
    images = sum(isinstance(part, ImageContent) for _, part in _parts(request.messages))
    if images > server.limits.images:
        raise RequestError(
            400, f"{images} images: wanted {server.limits.images} at most", param="messages", code="too_many_images"
        )
    messages, digests = [], []
    for place, message in enumerate(request.messages):
        loaded = [
            _load(part, f"messages.{place}.content.{k}", server, share) for k, part in enumerate(_content(message))
        ]
        messages.append(Message(roles[place], tuple(part for part, _ in loaded)))
        digests.append(tuple(digest for _, digest in loaded))
    return Chat(tuple(messages), tuple(digests))


def _content(message: ChatMessage) -> list[Any]:
    return [message.content] if isinstance(message.content, str) else list(message.content)


def _parts(messages: list[ChatMessage]) -> Iterator[tuple[ChatMessage, Any]]:
    return ((message, part) for message in messages for part in _content(message))


def _load(part: Any, where: str, server: ServerSettings, share: Share) -> tuple[Part, bytes]:
    if not isinstance(part, ImageContent):
        text = part if isinstance(part, str) else part.text
        return TextPart(text), text_digest(text)
    content = _image_bytes(part.image_url.url, where, server)
    if not _is_data(part.image_url.url):
        share.take(len(content))
    image = SentImage(content, where, server)
    return image, image.digest


def _is_data(url: str) -> bool:
    """Whether the content stands in the URL itself, which came with the body."""
    return url[:5].lower() == "data:"


def _image_bytes(url: str, where: str, server: ServerSettings) -> bytes:
    """What stands under a data: URL, or one of a domain that the operator named."""
    try:
        if _is_data(url):
            return data_url_bytes(url)
        parts = urlsplit(url)
        is_plain = parts.username is None and "\\" not in url  # which readers of URLs take for different things
        named = (parts.hostname or "").lower() in server.remote_domains
        if parts.scheme.lower() in ("http", "https") and named and is_plain:
            return fetch(url, follow_redirects=False)
    except (InputError, ValueError):
        raise RequestError(400, f"{where}: the image cannot be had", param=where, code="invalid_image_url") from None
    raise RequestError(
        400,
        f"{where}: wanted a data: URL of an image" + (", or one of the allowed domains" * bool(server.remote_domains)),
        param=where,
        code="invalid_image_url",
    )


def text_digest(text: str) -> bytes:
    """Of a part of text."""
    return hashlib.sha256(b"text" + text.encode("utf-8", "surrogatepass")).digest()
