"""How prompts go in."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RunOptions:
    """How prompts go in.

    Args:
        chunk_size: tokens of a chat that go through the model at a time; None: the prompt at once.
        progress: show a bar of the tokens read.
    """

    chunk_size: int | None = None
    progress: bool = False
