"""FLOPs of the language model, counted from the rows that really went through it. One multiply-add is two FLOPs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch.utils.flop_counter import FlopCounterMode

from mminfer.metrics.records import PromptRecord

if TYPE_CHECKING:
    from mminfer.models.base import ModelSpec


def layer_flops(spec: ModelSpec, rows: int, queries: int, ffn: int, pairs: int) -> int:
    """One decoder layer with a gated FFN; norms, rotary and activations are left out, as is usual.

    Args:
        spec: the model's geometry.
        rows: rows that are projected to keys and values.
        queries: rows that are projected to queries and out of the attention.
        ffn: rows that go through the FFN.
        pairs: query-key pairs that the causal attention looks at.
    """
    query_size = spec.num_attention_heads * spec.head_dim
    projections = 4 * spec.hidden_size * (queries * query_size + rows * spec.num_key_value_heads * spec.head_dim)
    return projections + 4 * query_size * pairs + 6 * spec.hidden_size * spec.intermediate_size * ffn


def head_flops(spec: ModelSpec, rows: int) -> int:
    """The head over the vocabulary."""
    return 2 * spec.hidden_size * spec.vocab_size * rows


def prompt_flops(spec: ModelSpec, record: PromptRecord) -> int:
    """A prompt pass as it ran, over the whole batch, the techniques' own work included."""
    layers = sum(
        layer_flops(spec, sum(x.rows), sum(x.queries), sum(x.ffn), sum(x.pairs)) + x.overhead_flops
        for x in record.layers
    )
    return layers + record.merge_flops + head_flops(spec, len(record.prompt))


def causal_pairs(new: int, past: int, window: int | None = None) -> int:
    """Query-key pairs of `new` tokens behind `past` ones; a query sees its last `window` keys, itself included."""
    pairs = new * past + new * (new + 1) // 2
    if window is None:
        return pairs
    beyond = [max(0, tokens - window) for tokens in (past, past + new)]
    return pairs - (beyond[1] * (beyond[1] + 1) - beyond[0] * (beyond[0] + 1)) // 2


def full_prompt_flops(spec: ModelSpec, prompt: Sequence[int], past: Sequence[int], ahead: Sequence[int] = ()) -> int:
    """The same prompt through the uncompressed model, with all earlier tokens in its cache.

    Args:
        spec: the model's geometry.
        prompt: tokens of each sequence.
        past: tokens before them.
        ahead: pairs of a token and a later one, of each sequence, where images attend in both directions.
    """
    rows, total = sum(prompt), head_flops(spec, len(prompt))
    for layer in range(spec.num_layers):
        window = spec.sliding_window if layer in spec.sliding_layers else None
        pairs = sum(causal_pairs(n, p, window) for n, p in zip(prompt, past, strict=True)) + sum(ahead)
        total += layer_flops(spec, rows, rows, rows, pairs)
    return total


def decode_flops(spec: ModelSpec, entries: Sequence[int]) -> int:
    """One token of one sequence over a cache with so many entries a head in each layer."""
    total = head_flops(spec, 1)
    for layer, n in enumerate(entries):
        window = spec.sliding_window if layer in spec.sliding_layers else None
        total += layer_flops(spec, 1, 1, 1, causal_pairs(1, n, window))
    return total


@contextmanager
def measured_flops() -> Iterator[FlopCounterMode]:
    """Counts matrix products as they run; causal attention by the pairs it looks at. Read `get_total_flops()`.

    torch's counter sees no attention on the CPU at all, and causal attention elsewhere as if it were dense.
    """
    ops = (
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu,
        torch.ops.aten._scaled_dot_product_flash_attention,
        torch.ops.aten._scaled_dot_product_efficient_attention,
    )
    with FlopCounterMode(display=False, custom_mapping=dict.fromkeys(ops, _attention_flops)) as counter:
        yield counter


def _attention_flops(
    q: Sequence[int],
    k: Sequence[int],
    v: Sequence[int],
    *args: object,
    is_causal: bool = False,
    **kwargs: object,
) -> int:
    """Shapes [B, H, S, D], [B, G, T, D]; the arguments of the fused attention ops, whose causal flag is their bool."""
    batch, heads, queries, size = q
    causal = is_causal or any(x is True for x in args)
    pairs = queries * (queries + 1) // 2 if causal else queries * k[2]
    return 2 * batch * heads * pairs * (size + v[3])
