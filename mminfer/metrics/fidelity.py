"""How far a compressed model's predictions are from the full model's."""

from __future__ import annotations

from torch import Tensor


def kl_divergence(full: Tensor, compressed: Tensor) -> Tensor:
    """KL(full || compressed) of next-token distributions, in nats.

    Args:
        full: [..., V] logits of the uncompressed model.
        compressed: [..., V] logits.

    Returns:
        [...] float32.
    """
    p, q = full.float().log_softmax(-1), compressed.float().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).clamp_min(0)


def top1_agreement(full: Tensor, compressed: Tensor) -> float:
    """Fraction of positions ([..., V] logits) whose most likely token is the same."""
    return (full.argmax(-1) == compressed.argmax(-1)).float().mean().item()
