"""A request: chats that were read for a model, so that all that is left is to run them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mminfer.inputs.reading import Reading


@dataclass(frozen=True)
class Request:
    """One chat or a batch of them, checked and prepared. It can be answered any number of times, by any engine of the
    same model, and nothing is rendered or opened again for that where the content of the chats is a list.

    Args:
        is_batch: whether it came as a list of chats.
        inputs: the model's, where prompts go in at once; else None.
        readings: where prompts go in piece by piece: each call begins a chat's from the front.
        chunk_size: tokens of a chat that then go through the model at a time.
        preparation_s: the seconds that all this took; they count to the time to the first token.
    """

    is_batch: bool
    inputs: dict[str, Any] | None
    readings: tuple[Callable[[], Reading], ...] = ()
    chunk_size: int | None = None
    preparation_s: float = 0.0
