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


def full_prompt_flops(spec: ModelSpec, prompt: Sequence[int], past: Sequence[int]) -> int:
    """The same prompt through the uncompressed model, with all earlier tokens in its cache."""
    pairs = sum(n * p + n * (n + 1) // 2 for n, p in zip(prompt, past, strict=True))
    rows = sum(prompt)
    return spec.num_layers * layer_flops(spec, rows, rows, rows, pairs) + head_flops(spec, len(prompt))


def decode_flops(spec: ModelSpec, entries: Sequence[int]) -> int:
    """One token of one sequence over a cache with so many entries a head in each layer."""
    return sum(layer_flops(spec, 1, 1, 1, n + 1) for n in entries) + head_flops(spec, 1)


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
