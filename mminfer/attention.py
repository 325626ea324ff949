"""Prompt attention over packed rows, and the seam through which the host's attention modules reach it.

The host's attention modules project, normalise and rotate, then call whatever function their config names. For the
time of one pass that name is ours, and the function hands queries, keys and values to the callable that the pass gave
each layer as a keyword argument. Nothing stays registered after the pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAME = "mminfer"
BLOCK_ROWS = 512
MASK_ELEMENTS = 1 << 24
_lock, _users = Lock(), 0


class Attend(Protocol):
    """One layer's attention: q [1, H, T, D], k and v [1, G, T, D], after rotation -> [1, H, T, D]."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor: ...


def _attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    attend: Attend,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return attend(query, key, value, scale, sliding_window).transpose(1, 2), None


@contextmanager
def routed_attention(config: Any) -> Iterator[None]:
    """Routes the attention of the language model with this text config to the `attend=` its layers are given."""
    global _users
    with _lock:
        _users += 1
        ALL_ATTENTION_FUNCTIONS[NAME] = _attention_forward
    previous, config._attn_implementation_internal = config._attn_implementation_internal, NAME
    try:
        yield
    finally:
        config._attn_implementation_internal = previous
        with _lock:
            _users -= 1
            if _users == 0:
                del ALL_ATTENTION_FUNCTIONS[NAME]


def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    query_index: Tensor | None = None,
    window: int | None = None,
) -> Tensor:
    """softmax(q k^T * scale + causal) v of one sequence, never the whole score matrix.

    Args:
        q: [1, H, S, D].
        k: [1, G, N, D].
        v: [1, G, N, D].
        scale: factor of the scores.
        query_index: [S] int64 ascending: the place of each query among the keys; None: query j is key j (S = N).
        window: a query sees its last `window` keys only.

    Returns:
        [1, H, S, D].
    """
    num_keys = k.shape[2]
    if query_index is None and (window is None or window >= num_keys):
        return F.scaled_dot_product_attention(q, k, v, scale=scale, is_causal=True, enable_gqa=True)
    if query_index is None:
        query_index = torch.arange(num_keys, device=q.device)
    rows = max(1, min(BLOCK_ROWS, MASK_ELEMENTS // num_keys))
    blocks = []
    for q_block, places in zip(q.split(rows, 2), query_index.split(rows), strict=True):
        last = int(places[-1]) + 1
        first = 0 if window is None else max(0, int(places[0]) - window + 1)
        age = places[:, None] - torch.arange(first, last, device=q.device)
        mask = age >= 0 if window is None else (age >= 0) & (age < window)
        keys, values = k[:, :, first:last], v[:, :, first:last]
        blocks.append(
            F.scaled_dot_product_attention(q_block, keys, values, attn_mask=mask, scale=scale, enable_gqa=True)
        )
    return torch.cat(blocks, 2) if blocks else torch.empty_like(q)
