"""The prompt pass: the host's own decoder layers on packed rows that may leave on the way, chunk by chunk if asked."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mminfer.config import InferenceConfig
from mminfer.forward.attention import routed_attention
from mminfer.forward.kv_cache import CompressedCache, Continuation
from mminfer.forward.kv_layer import CompressedLayer
from mminfer.forward.layer_attention import LayerAttention
from mminfer.forward.rotary import Tables, fractional, frequency_factors
from mminfer.layout import TokenLayout
from mminfer.metrics.records import LayerRecord, PromptRecord, joined_layers
from mminfer.models.base import ModelAdapter, ModelSpec


@dataclass(frozen=True)
class PromptOutput:
    """What a prompt pass gives, before the final norm.

    Args:
        last: [B, C] hidden states of each sequence's last row.
        hidden: [T, C] hidden states of all rows; None where some left on the way or nobody asked.
        record: what was done.
    """

    last: Tensor
    hidden: Tensor | None
    record: PromptRecord


@torch.no_grad()
def prompt_pass(
    adapter: ModelAdapter,
    config: InferenceConfig,
    inputs_embeds: Tensor,
    layout: TokenLayout,
    cache: CompressedCache,
    columns: int,
    *,
    chunk_size: int | None = None,
    last_only: bool = False,
    progress: Callable[[int], object] | None = None,
) -> PromptOutput:
    """Runs a prompt, or the next stretch of one, through the language model and fills the cache.

    In chunks, no more than so many rows of a sequence are in the layers at once and the cache is compressed behind
    each of them, so memory follows from chunk and budget, not from the prompt. Positions and merging are settled
    before; pruning looks at one chunk at a time. If anything raises, the cache is as it was.

    Args:
        adapter: the host model.
        config: the techniques.
        inputs_embeds: [T, C], packed.
        layout: of these T rows, at the host's positions.
        cache: empty, or what came before.
        columns: by how much the host will believe the cache to have grown.
        chunk_size: rows of a sequence that go through the layers at a time; None: all. Images are never split.
        last_only: whether nobody will ask for hidden states other than the last row's.
        progress: told after each chunk how many tokens of the prompt it was.

    Raises:
        InputError: an image does not fit into a chunk.
    """
    if cache.layers:
        layout = _after(layout, cache)
    if config.positions is not None:
        layout = config.positions.apply(layout, adapter.spec.max_position_embeddings)
    next_position = layout.next_position
    continuation = Continuation(next_position, layout.resume_position, layout.last_in_run)
    earlier = cache.tokens or (0,) * layout.num_sequences
    record = PromptRecord(earlier, layout.lengths, layout.visual_lengths, ahead=_ahead(layout))
    length = cache.rotary_length or float(next_position.max())
    _warn_beyond(adapter.spec, config, next_position, cache)
    if config.merge is not None:
        record.merge_flops = config.merge.cost(adapter.spec, config.merge.unit_lengths(layout))
        inputs_embeds, layout = config.merge.apply(inputs_embeds, layout)
    record.merged = layout.lengths
    factors = frequency_factors(config, adapter.spec, length)
    tables = adapter.rotary(inputs_embeds[None], layout.position[:, None], fractional(config), factors)
    keeps_rows = not (last_only or config.removes_rows)
    whole = torch.empty_like(inputs_embeds) if keeps_rows and chunk_size is not None else None
    layers: list[list[LayerRecord]] = []
    undo = cache.snapshot()
    try:
        for rows in layout.chunks(chunk_size):
            everything = len(rows) == len(layout)
            chunk = (inputs_embeds, layout, tables) if everything else keep_rows(rows, inputs_embeds, layout, tables)
            hidden, left, records = _run_layers(adapter, config, *chunk, cache)
            layers.append(records)
            if whole is not None:
                whole[rows] = hidden
            if progress is not None:
                progress(len(rows) * sum(record.prompt) // len(layout))
        taken_in = [a + b for a, b in zip(earlier, record.prompt, strict=True)]
        cache.commit(cache.layers, columns, taken_in, continuation, length)
    except BaseException:
        undo()
        raise
    record.layers = joined_layers(layers)
    if whole is None and keeps_rows:
        whole = hidden
    return PromptOutput(hidden[[stop - 1 for _, stop in left.spans]], whole, record)


def _run_layers(
    adapter: ModelAdapter,
    config: InferenceConfig,
    embeds: Tensor,
    layout: TokenLayout,
    tables: Tables,
    cache: CompressedCache,
) -> tuple[Tensor, TokenLayout, list[LayerRecord]]:
    """All layers over the rows of one chunk ([T, C]), behind what the cache holds; it then holds them too."""
    origin = tuple(zip(layout.lengths, layout.visual_lengths, strict=True))
    hidden, depth = embeds[None], adapter.spec.num_layers
    layers: list[CompressedLayer] = []
    records: list[LayerRecord] = []
    unsettled: list[tuple[LayerAttention, Tensor | None]] = []
    settles = config.cache is not None and config.cache.settles
    with routed_attention(adapter.text_config):
        for i in range(depth):
            queries, ffn = (None, None) if config.skip is None else config.skip.apply(layout, i, depth)
            past = cache.layers[i] if cache.layers else None
            attend = LayerAttention(adapter, config, layout, i, origin, queries, past)
            hidden = _through_layer(attend, hidden, tables[adapter.layer_kinds[i]], ffn)
            if settles:
                unsettled.append((attend, ffn))
            else:
                layers.append(CompressedLayer(attend.entries, attend.seen, cache))
                records.append(attend.record(ffn))
            if attend.kept:
                kept, layout, tables = keep_rows(torch.cat(attend.kept), hidden[0], layout, tables)
                hidden = kept[None]
    if settles:
        _settle(config, [attend for attend, _ in unsettled])
        layers = [CompressedLayer(attend.entries, attend.seen, cache) for attend, _ in unsettled]
        records = [attend.record(ffn) for attend, ffn in unsettled]
    cache.layers = layers
    return hidden[0], layout, records


def _settle(config: InferenceConfig, layers: Sequence[LayerAttention]) -> None:
    """Each sequence's entries in all layers together."""
    if config.cache is None:
        return
    for b in range(layers[0].layout.num_sequences):
        held, needs, seen = ([getattr(a, name)[b] for a in layers] for name in ("entries", "needs", "seen"))
        for attend, entries in zip(layers, config.cache.settle(held, needs, seen), strict=True):
            attend.take(b, entries)


def keep_rows(kept: Tensor, hidden: Tensor, layout: TokenLayout, tables: Tables) -> tuple[Tensor, TokenLayout, Tables]:
    """Hidden states [T, C], layout and rotary tables of the rows in `kept` ([K] int64, ascending)."""
    narrowed = {kind: (cos.index_select(-2, kept), sin.index_select(-2, kept)) for kind, (cos, sin) in tables.items()}
    return hidden.index_select(0, kept), layout.select(kept), narrowed


def _through_layer(
    attend: LayerAttention, hidden: Tensor, position_embeddings: tuple[Tensor, Tensor], ffn: Tensor | None
) -> Tensor:
    """[1, T, C] behind the host's layer; ffn: [K] packed rows that go through its FFN, None: all."""
    adapter, skip, companions = attend.adapter, attend.config.skip, attend.layout.companions
    layer = adapter.layers[attend.layer_idx]
    narrow = nullcontext() if skip is None else skip.narrow(layer, adapter.ffn_modules, attend.queries, ffn)
    with narrow:
        hidden = layer(
            hidden, position_embeddings=position_embeddings, attention_mask=None, use_cache=False, attend=attend
        )
    if companions is None or attend.layer_idx >= companions.shape[1]:
        return hidden
    return hidden.index_add(1, attend.layout.visual_rows, companions[None, :, attend.layer_idx])


def _ahead(layout: TokenLayout) -> tuple[int, ...]:
    if layout.reach is None:
        return ()
    ahead = layout.reach - torch.arange(len(layout), device=layout.reach.device)
    return tuple(ahead.new_zeros(layout.num_sequences).index_add(0, layout.sequence, ahead).tolist())


def _after(layout: TokenLayout, cache: CompressedCache) -> TokenLayout:
    """The layout moved so that each sequence's first token stands at its next position."""
    first = layout.position[:, [start for start, _ in layout.spans]].amin(0)
    shift = cache.continuation.prefill.to(first.device) - first
    return replace(
        layout,
        position=layout.position + shift[layout.sequence],
        next_position=layout.next_position + shift,
        run_before=cache.continuation.visual_run.to(first.device),
    )


def _warn_beyond(spec: ModelSpec, config: InferenceConfig, next_position: Tensor, cache: CompressedCache) -> None:
    """Once, when a prompt leaves the positions that the model was made for."""
    reached, window, positions = float(next_position.max()), spec.max_position_embeddings, config.positions
    covered = window if positions is None else positions.covers(cache.rotary_length or reached, window)
    if reached <= covered or (cache.layers and float(cache.next_position.max()) > covered):
        return
    way = "a smaller delta" if fractional(config) else "V2PE, for example positions=V2PE(delta=1/16),"
    wider = positions is not None and positions.wider
    scaled = "" if covered == window else f" and its frequencies are scaled for {covered:.0f}"
    warnings.warn(
        f"the prompt reaches rotary position {reached:.0f}, but the model was made for {window}{scaled}: answers "
        f"may break down; {wider or f'{way} brings visual tokens closer together'}",
        stacklevel=2,
    )
