"""Attention of rows that go by again in C++ (`csrc/cpu/attention.cpp`), group by group: one keeps all cores busy."""

import torch

from mminfer_kernels.prompt_attention.native import prompt_attention_peak
from mminfer_kernels.replay_attention.reference import by_groups


def replay_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    groups: torch.Tensor,
    seen: torch.Tensor,
    longest: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `mminfer_kernels.replay_attention`."""
    return by_groups(prompt_attention_peak, q, k, v, keys, values, groups, scale)
