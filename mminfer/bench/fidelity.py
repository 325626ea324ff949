"""How far settings move a model's predictions: the uncompressed model's continuation, forced upon each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from mminfer.bench.protocols import Ask
from mminfer.metrics.fidelity import kl_divergence, top1_agreement


@dataclass(frozen=True)
class Continuation:
    """What the uncompressed model says.

    Args:
        token_ids: N tokens.
        logits: [N, vocabulary], what each was chosen from.
    """

    token_ids: list[int]
    logits: Tensor


@dataclass(frozen=True)
class Fidelity:
    """How close to the uncompressed model.

    Args:
        kl: KL(full || compressed) in nats, mean over positions.
        top1: fraction of positions whose most likely token is the same.
        positions: how many were compared.
    """

    kl: float
    top1: float
    positions: int


class _Forced(LogitsProcessor):
    """Leaves one token to choose from at each step."""

    def __init__(self, token_ids: list[int]) -> None:
        self._left = token_ids[::-1]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        forced = torch.full_like(scores, -torch.inf)
        forced[:, self._left.pop()] = 0
        return forced


def continuation(ask: Ask, question: str, tokens: int) -> Continuation:
    """The greedy answer, gone on with beyond its end to so many tokens."""
    output = ask(question, max_new_tokens=tokens, min_new_tokens=tokens, **_GREEDY)
    assert output.logits is not None
    return Continuation(output.token_ids, output.logits)


def forced_logits(ask: Ask, question: str, token_ids: list[int]) -> Tensor:
    """[N, vocabulary]: what predicts each of these N tokens when those before it are given.

    No token among them may end the turn.
    """
    processors = LogitsProcessorList([_Forced(token_ids)])
    output = ask(question, max_new_tokens=len(token_ids), logits_processor=processors, **_GREEDY)
    assert output.logits is not None
    return output.logits


def fidelity(full: Tensor, compressed: Tensor) -> Fidelity:
    """Compares logits, [N, vocabulary] each."""
    kl = kl_divergence(full, compressed).mean().item()
    return Fidelity(kl, top1_agreement(full, compressed), len(full))


_GREEDY: dict[str, Any] = {"do_sample": False, "num_beams": 1, "output_logits": True}
