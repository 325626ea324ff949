"""What an answer is."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mminfer.metrics.stats import GenerationStats


@dataclass(frozen=True)
class GenerationOutput:
    """One answer.

    Attributes:
        text: the answer without special tokens.
        token_ids: what was generated, the end of the turn included.
        stats: what it cost.
        logits: [new tokens, V] float32, of every generated token, where `output_logits=True` was asked for.
    """

    text: str
    token_ids: list[int]
    stats: GenerationStats
    logits: torch.Tensor | None = None
