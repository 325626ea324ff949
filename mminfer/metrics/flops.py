"""FLOPs of the language model by layer and operator, from the rows that really went through it.

One multiply-add is two FLOPs. Norms, rotary and activations are left out, as is usual.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

from mminfer.metrics.measured import measured_flops
from mminfer.metrics.records import PromptRecord

if TYPE_CHECKING:
    from mminfer.models.spec import ModelSpec

__all__ = [
    "LayerFlops",
    "PassFlops",
    "causal_pairs",
    "decode_counts",
    "decode_flops",
    "full_prompt_counts",
    "full_prompt_flops",
    "head_flops",
    "layer_counts",
    "layer_flops",
    "measured_flops",
    "prompt_counts",
    "prompt_flops",
]


@dataclass(frozen=True)
class LayerFlops:
    """One decoder layer with a gated FFN, by operator.

    Args:
        q, k, v, o: the projections of the attention.
        logits: queries times keys.
        values: probabilities times values.
        ffn: its three products.
        prune: what choosing the tokens that leave took.
        cache: what compressing the cache took.
    """

    q: int = 0
    k: int = 0
    v: int = 0
    o: int = 0
    logits: int = 0
    values: int = 0
    ffn: int = 0
    prune: int = 0
    cache: int = 0

    @property
    def total(self) -> int:
        """All operators together."""
        return sum(dataclasses.astuple(self))


@dataclass(frozen=True)
class PassFlops:
    """One pass through the language model.

    Args:
        layers: one a layer.
        merge: what merging tokens before the first layer took.
        head: the head over the vocabulary, of each sequence's last token.
    """

    layers: tuple[LayerFlops, ...]
    merge: int = 0
    head: int = 0

    @property
    def by_operator(self) -> dict[str, int]:
        """Operator -> FLOPs over all layers; merge and head beside them."""
        names = [field.name for field in dataclasses.fields(LayerFlops)]
        sums = {name: sum(getattr(layer, name) for layer in self.layers) for name in names}
        return {**sums, "merge": self.merge, "head": self.head}

    @property
    def techniques(self) -> int:
        """What the techniques themselves took, of the total."""
        return self.merge + sum(layer.prune + layer.cache for layer in self.layers)

    @property
    def total(self) -> int:
        """The whole pass."""
        return sum(self.by_operator.values())


def layer_counts(spec: ModelSpec, rows: int, queries: int, ffn: int, pairs: int | Fraction) -> LayerFlops:
    """One decoder layer, without what techniques spend.

    Args:
        spec: the model's geometry.
        rows: rows that are projected to keys and values.
        queries: rows that are projected to queries and out of the attention.
        ffn: rows that go through the FFN.
        pairs: query-key pairs a head that the attention looks at.
    """
    query_size = spec.num_attention_heads * spec.head_dim
    per_query = 2 * spec.hidden_size * query_size * queries
    per_row = 2 * spec.hidden_size * spec.num_key_value_heads * spec.head_dim * rows
    looked = int(2 * query_size * pairs)
    ffn_flops = 6 * spec.hidden_size * spec.intermediate_size * ffn
    return LayerFlops(per_query, per_row, per_row, per_query, looked, looked, ffn_flops)


def layer_flops(spec: ModelSpec, rows: int, queries: int, ffn: int, pairs: int) -> int:
    """The total of `layer_counts`."""
    return layer_counts(spec, rows, queries, ffn, pairs).total


def head_flops(spec: ModelSpec, rows: int) -> int:
    """The head over the vocabulary."""
    return 2 * spec.hidden_size * spec.vocab_size * rows


def prompt_counts(spec: ModelSpec, record: PromptRecord, dense: bool = False) -> PassFlops:
    """A prompt pass as it ran, over the whole batch, the techniques' own work included.

    Args:
        spec: the model's geometry.
        record: what was done.
        dense: count the attention as if every query looked at every key there was, as papers do, and not only at
            those that causality and windows let it see.
    """
    layers = []
    for x in record.layers:
        pairs = sum(q * k for q, k in zip(x.queries, x.keys, strict=True)) if dense else sum(x.pairs)
        own = layer_counts(spec, sum(x.rows), sum(x.queries), sum(x.ffn), pairs)
        layers.append(dataclasses.replace(own, prune=sum(x.prune_flops), cache=sum(x.cache_flops)))
    return PassFlops(tuple(layers), record.merge_flops, head_flops(spec, len(record.prompt)))


def prompt_flops(spec: ModelSpec, record: PromptRecord, dense: bool = False) -> int:
    """The total of `prompt_counts`."""
    return prompt_counts(spec, record, dense).total


def causal_pairs(new: int, past: int, window: int | None = None) -> int:
    """Query-key pairs of `new` tokens behind `past` ones; a query sees its last `window` keys, itself included."""
    pairs = new * past + new * (new + 1) // 2
    if window is None:
        return pairs
    beyond = [max(0, tokens - window) for tokens in (past, past + new)]
    return pairs - (beyond[1] * (beyond[1] + 1) - beyond[0] * (beyond[0] + 1)) // 2


def full_prompt_counts(
    spec: ModelSpec, prompt: Sequence[int], past: Sequence[int], ahead: Sequence[int] = (), dense: bool = False
) -> PassFlops:
    """The same prompt through the uncompressed model, with all earlier tokens in its cache.

    Args:
        spec: the model's geometry.
        prompt: tokens of each sequence.
        past: tokens before them.
        ahead: pairs of a token and a later one, of each sequence, where images attend in both directions.
        dense: see `prompt_counts`.
    """
    rows, lengths = sum(prompt), list(zip(prompt, past, strict=True))
    layers = []
    for window in _windows(spec, range(spec.num_layers)):
        seen = sum(causal_pairs(n, p, window) for n, p in lengths) + sum(ahead)
        pairs = sum(n * (n + p) for n, p in lengths) if dense else seen
        layers.append(layer_counts(spec, rows, rows, rows, pairs))
    return PassFlops(tuple(layers), head=head_flops(spec, len(prompt)))


def full_prompt_flops(
    spec: ModelSpec, prompt: Sequence[int], past: Sequence[int], ahead: Sequence[int] = (), dense: bool = False
) -> int:
    """The total of `full_prompt_counts`."""
    return full_prompt_counts(spec, prompt, past, ahead, dense).total


def decode_counts(spec: ModelSpec, entries: Sequence[int | Sequence[int]]) -> PassFlops:
    """One token of one sequence over its cache.

    Args:
        spec: the model's geometry.
        entries: of each layer, entries a head, or those of each of its heads; the token's own not among them.
    """
    windows = _windows(spec, range(len(entries)))
    pairs = (_decode_pairs(n, window) for n, window in zip(entries, windows, strict=True))
    return PassFlops(tuple(layer_counts(spec, 1, 1, 1, x) for x in pairs), head=head_flops(spec, 1))


def decode_flops(spec: ModelSpec, entries: Sequence[int | Sequence[int]]) -> int:
    """The total of `decode_counts`."""
    return decode_counts(spec, entries).total


def _decode_pairs(entries: int | Sequence[int], window: int | None) -> int | Fraction:
    if isinstance(entries, int):
        return causal_pairs(1, entries, window)
    return Fraction(sum(causal_pairs(1, n, window) for n in entries), len(entries))


def _windows(spec: ModelSpec, layers: Iterable[int]) -> list[int | None]:
    return [spec.sliding_window if layer in spec.sliding_layers else None for layer in layers]
