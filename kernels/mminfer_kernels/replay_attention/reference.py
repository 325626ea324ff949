"""Attention of rows that go by again in plain PyTorch, group by group."""

from collections.abc import Callable
from functools import partial

import torch

from mminfer_kernels.prompt_attention.reference import prompt_attention_peak, rows_first

Peak = Callable[..., tuple[torch.Tensor, torch.Tensor]]


@torch.no_grad()
def by_groups(
    attend: Peak,
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
    """`mminfer_kernels.replay_attention` by some `prompt_attention_peak`, `attend`."""
    peak = torch.zeros(keys.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
    if q.numel() == 0:
        return rows_first(torch.empty_like(q)), peak
    out = []
    for start, stop, begin, end in groups.tolist():
        ahead = int(begin > 0)
        own_keys, own_values = (
            torch.cat([x[:, :, :ahead], x[:, :, begin:end], own[:, :, start:stop]], 2)
            for x, own in ((keys, k), (values, v))
        )
        read, found = attend(q[:, :, start:stop], own_keys, own_values, scale, None, ahead + end - begin)
        out.append(read)
        highest = peak[:, :, begin:end]
        torch.maximum(highest, found[:, :, ahead:], out=highest)
    return rows_first(torch.cat(out, 2)), peak


replay_attention = partial(by_groups, prompt_attention_peak)
