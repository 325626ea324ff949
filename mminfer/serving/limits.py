"""What the operator of a server allows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from mminfer.config import InferenceConfig


@dataclass(frozen=True)
class ServerLimits:
    """What one request may be; whatever goes beyond is refused by an HTTP status that clients know.

    Args:
        body_bytes: of a request's body.
        images: of a request.
        pixels: of one image.
        new_tokens: of one answer; also what it gets where the request names no number.
        answers: that one request may ask for by `n`.
        request_s: from the body's arrival to the last token.
        body_s: for the body to arrive.
        held_bytes: of the bodies and decoded images of all requests together.
        text_tokens: of the words of a request.
    """

    body_bytes: int = 64 * 2**20
    images: int = 64
    pixels: int = 24_000_000
    new_tokens: int = 1024
    answers: int = 8
    request_s: float = 600.0
    body_s: float = 60.0
    held_bytes: int = 2 * 2**30
    text_tokens: int = 131_072


@dataclass(frozen=True)
class ServerSettings:
    """What a server does.

    Args:
        model_id: by which requests name the model.
        settings: by the names that requests may choose; the first holds where none is chosen.
        limits: of requests.
        api_key: that requests must bring; None: none.
        remote_domains: from which images are fetched; no others, and no redirects are followed.
        hosts: that a request's Host header may name where there is no key; else any.
    """

    model_id: str
    settings: Mapping[str, InferenceConfig]
    limits: ServerLimits = field(default_factory=ServerLimits)
    api_key: str | None = None
    remote_domains: frozenset[str] = frozenset()
    hosts: tuple[str, ...] = ("localhost", "127.0.0.1", "[::1]", "::1")
