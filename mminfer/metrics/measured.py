"""FLOPs counted while code runs, by torch's counter with formulas that know which pairs an attention needs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

# The fused attentions that scaled_dot_product_attention dispatches to; the name of the mask differs.
FUSED = {
    "_scaled_dot_product_flash_attention_for_cpu": "attn_mask",
    "_scaled_dot_product_flash_attention": "",
    "_scaled_dot_product_efficient_attention": "attn_bias",
    "_scaled_dot_product_cudnn_attention": "attn_bias",
    "_scaled_dot_product_fused_attention_overrideable": "attn_bias",
}


@contextmanager
def measured_flops() -> Iterator[FlopCounterMode]:
    """Counts matrix products as they run, attention by the pairs it needs. Read `get_total_flops()`.

    torch's counter sees no attention on the CPU at all, and causal or masked attention elsewhere as if it were dense.
    Ops of `mminfer_kernels` count by their own formulas, whichever backend runs. What an attention written out in
    plain products (the host's "eager") masks is computed, and counted.
    """
    formulas = {op: _formula(op, mask) for name, mask in FUSED.items() if (op := getattr(torch.ops.aten, name, None))}
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        yield counter


def _formula(op: Any, mask_name: str) -> Callable[..., int]:
    """Of one fused attention, called with its arguments and `out_val`."""
    names = [argument.name for argument in op.default._schema.arguments]

    def formula(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
        given = dict(zip(names, args, strict=False)) | kwargs
        q, k, v = given["query"], given["key"], given["value"]
        pairs = _pairs(q.shape, k.shape[2], given.get("is_causal", False), given.get(mask_name))
        return 2 * pairs * (q.shape[3] + v.shape[3])

    formula._get_raw = True  # type: ignore[attr-defined]  # the counter hands tensors over, not their shapes
    return formula


def _pairs(shape: torch.Size, keys: int, causal: bool, mask: Tensor | None) -> int:
    """Query-key pairs of [B, H, S, D] queries that count, over batch and heads; a mask is a bool or added to logits."""
    batch, heads, queries, _ = shape
    if mask is not None:
        seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
        return int(seen.sum()) * (batch * heads * queries * keys // max(1, mask.numel()))
    if causal:  # the first query sees the first key
        square = min(queries, keys)
        return batch * heads * (square * (square + 1) // 2 + (queries - square) * keys)
    return batch * heads * queries * keys
