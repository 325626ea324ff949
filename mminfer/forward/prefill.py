"""The prompt pass: the host's own decoder layers on packed rows that may leave on the way, chunk by chunk if asked."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from mminfer.config import InferenceConfig
from mminfer.errors import InputError
from mminfer.forward.attention import routed_attention
from mminfer.forward.kv_cache import CompressedCache, Continuation
from mminfer.forward.kv_layer import CompressedLayer
from mminfer.forward.layer_attention import LayerAttention, PassSettings
from mminfer.forward.layer_groups import LayerGroup, Passed, compress_together, most_together
from mminfer.forward.packed_layer import layers_of
from mminfer.forward.replay import LayersAgain, ReplayAttention
from mminfer.forward.rotary import fractional, frequency_factors
from mminfer.forward.rows import Rows, through_layer
from mminfer.layout import TokenLayout
from mminfer.metrics.records import LayerRecord, PromptRecord, joined_layers
from mminfer.models.adapter import ModelAdapter
from mminfer.models.spec import ModelSpec
from mminfer.technique import compressed_layers, fetched


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


@dataclass(frozen=True)
class PassOptions:
    """How a prompt goes through the layers.

    Args:
        columns: by how much the host will believe the cache to have grown.
        chunk_size: rows of a sequence that go through the layers at a time; None: all. Images are never split.
        last_only: whether nobody will ask for hidden states other than the last row's.
        progress: told after each chunk how many tokens of the prompt it was.
        places_given: whether the caller says at which positions the rows stand, also behind what the cache holds.
        between_layers: called behind each layer, so that others may have a turn. It leaves this cache alone.
    """

    columns: int
    chunk_size: int | None = None
    last_only: bool = False
    progress: Callable[[int], object] | None = None
    places_given: bool = False
    between_layers: Callable[[], object] | None = None


@torch.no_grad()
def prompt_pass(
    adapter: ModelAdapter,
    config: InferenceConfig,
    inputs_embeds: Tensor,
    layout: TokenLayout,
    cache: CompressedCache,
    options: PassOptions,
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
        options: how the prompt goes through the layers.

    Raises:
        InputError: an image does not fit into a chunk, or goes on from one pass into another; or the cache technique
            has no room for the prompt.
    """
    layout = layout.placed_as(_placed(adapter, config, layout.on_host, cache, options.places_given))
    continuation = Continuation(layout.next_position, layout.resume_position, layout.last_in_run)
    earlier = cache.tokens or (0,) * layout.num_sequences
    record = PromptRecord(earlier, layout.lengths, layout.visual_lengths, pairs_ahead=_pairs_ahead(layout))
    length = cache.rotary_length or float(layout.next_position.max())
    if layout.stand_in is not None:
        kept, layout = layout.without_copies() if config.tower is None else config.tower.leave(layout)
        inputs_embeds = inputs_embeds.index_select(0, kept.to(inputs_embeds.device, non_blocking=True))
    if config.merge is not None:
        record.merge_flops = config.merge.cost(adapter.spec, config.merge.unit_lengths(layout))
        inputs_embeds, layout = config.merge.apply(inputs_embeds, layout)
    record.merged = layout.lengths
    if config.cache is not None:
        config.cache.check_prompt(layout, adapter.spec, cache.layers[0].tokens_seen if cache.layers else earlier)
    factors = frequency_factors(config, adapter.spec, length)
    tables = adapter.rotary(inputs_embeds[None], layout.position[:, None], fractional(config), factors)
    undo = cache.snapshot()
    try:
        rotate = partial(adapter.rotary, precise=fractional(config), factors=factors)
        out = _run_chunks(adapter, config, Rows(inputs_embeds, layout, tables, rotate), cache, options, record)
        taken_in = [a + b for a, b in zip(earlier, record.prompt, strict=True)]
        cache.commit(cache.layers, options.columns, taken_in, continuation, length)
    except BaseException:
        undo()
        raise
    return out


def _placed(
    adapter: ModelAdapter, config: InferenceConfig, layout: TokenLayout, cache: CompressedCache, places_given: bool
) -> TokenLayout:
    """The layout, on the CPU, at its rotary positions, behind what the cache holds; places_given: see `PassOptions`."""
    if cache.layers:
        layout = _continued(layout, cache, places_given and config.positions is None)
    if config.positions is not None:
        layout = config.positions.apply(layout, adapter.spec.max_position_embeddings)
    _warn_beyond_window(adapter.spec, config, layout.next_position, cache)
    return layout


def _run_chunks(
    adapter: ModelAdapter,
    config: InferenceConfig,
    rows: Rows,
    cache: CompressedCache,
    options: PassOptions,
    record: PromptRecord,
) -> PromptOutput:
    """All rows through all layers, chunk by chunk; the record is filled in."""
    keeps_rows = not (options.last_only or config.removes_rows)
    whole = torch.empty_like(rows.hidden) if keeps_rows and options.chunk_size is not None else None
    layers: list[list[LayerRecord]] = []
    for index in rows.layout.chunks(options.chunk_size):
        chunk = rows if len(index) == len(rows.layout) else rows.select(index)
        left, records = _run_layers(adapter, config, chunk, cache, options.between_layers)
        layers.append(records)
        if whole is not None:
            whole.index_copy_(0, index.to(whole.device, non_blocking=True), left.hidden)
        if options.progress is not None:
            options.progress(len(index) * sum(record.prompt) // len(rows.layout))
    record.layers = joined_layers(layers)
    if whole is None and keeps_rows:
        whole = left.hidden
    last = torch.cat([left.hidden[stop - 1 : stop] for _, stop in left.layout.spans])
    return PromptOutput(last, whole, record)


def _run_layers(
    adapter: ModelAdapter,
    config: InferenceConfig,
    rows: Rows,
    cache: CompressedCache,
    between_layers: Callable[[], object] | None,
) -> tuple[Rows, list[LayerRecord]]:
    """All layers over the rows of one chunk, behind what the cache holds; it then holds them too."""
    depth, across_layers = adapter.spec.num_layers, config.cache is not None and config.cache.across_layers
    most = most_together(rows.hidden.device, depth)
    together = config.cache is not None and config.cache.together and most > 1
    group = LayerGroup(config.cache if together and not across_layers else None, most)
    settings = PassSettings(adapter, config, rows.layout.lengths, together)
    entered, again = rows, LayersAgain(config, between_layers)
    done: list[Passed] = []  # of all layers, where they are compressed together
    layers: list[CompressedLayer] = []
    records: list[LayerRecord] = []

    def finish(passed: Sequence[Passed]) -> None:
        layers.extend(layers_of([a.entries for a, _ in passed], [a.tokens_seen for a, _ in passed], cache))
        records.extend(attend.record(ffn) for attend, ffn in passed)

    with routed_attention(adapter.text_config):
        for i in range(depth):
            queries, ffn = (None, None) if config.skip is None else config.skip.apply(rows.layout, i, depth)
            past = cache.layers[i] if cache.layers else None
            attend = LayerAttention(settings, rows.layout, i, queries, past)
            kind = adapter.layer_kinds[i]
            hidden = through_layer(attend, rows.hidden[None], rows.tables[kind], ffn)[0]
            again.behind_layer(attend, rows)
            rows = replace(rows, hidden=hidden)
            if across_layers:
                done.append((attend, ffn))
            else:
                finish(group.add(attend, ffn))
            if attend.kept:
                kept = attend.kept
                rows = rows.select(kept[0] if len(kept) == 1 else torch.cat(kept), attend.counts_left())
            if between_layers is not None:
                between_layers()
        if across_layers:
            again.behind_all([attend for attend, _ in done], entered)
    if across_layers:
        _compress_together(config, [attend for attend, _ in done], again.settled())
        finish(done)
    else:
        finish(group.rest())
    cache.layers = layers
    return rows, records


def _compress_together(
    config: InferenceConfig, layers: Sequence[LayerAttention], looked: Sequence[ReplayAttention]
) -> None:
    """Each sequence's entries in all layers together; looked: what was asked for, where rows were replayed."""
    if config.cache is None:
        return
    for b, (start, stop) in enumerate(layers[0].layout.spans):
        if start == stop:  # it comes in with a later chunk, and stays as it is until then
            continue
        if layers[0].settings.together:
            compress_together(config.cache, [(attend, b) for attend in layers])
            continue
        held, demands, seen = ([getattr(a, name)[b] for a in layers] for name in ("entries", "demands", "tokens_seen"))
        asked = [look.found[b] for look in looked] or fetched(demands)
        for attend, entries in zip(layers, compressed_layers(config.cache, held, asked, seen), strict=True):
            attend.replace_entries(b, entries)


def _pairs_ahead(layout: TokenLayout) -> tuple[int, ...]:
    """Pairs of each sequence in which a row sees a later one; empty where none does."""
    own = layout.on_host
    if own.last_visible_row is None:
        return ()
    ahead = own.last_visible_row - torch.arange(len(own))
    return tuple(ahead.new_zeros(own.num_sequences).index_add(0, own.sequence, ahead).tolist())


def _continued(layout: TokenLayout, cache: CompressedCache, in_place: bool) -> TokenLayout:
    """The layout moved so that each sequence's first token stands at its next position; in_place: it does already.

    Raises:
        InputError: a sequence is to be moved, and its first token stands within an image.
    """
    if in_place:
        return replace(layout, run_before=cache.continuation.visual_run.to(layout.position.device))
    places = layout.position[:, [start for start, _ in layout.spans]]
    first = places.amin(0)
    if bool((places != first).any()):
        raise InputError(
            "a stretch of a prompt begins within an image, whose tokens are placed together: let it begin before or "
            "behind one, by another prefill_chunk_size, or give that to patch(...)"
        )
    shift = cache.continuation.prefill.to(first.device) - first
    return replace(
        layout,
        position=layout.position + shift[layout.sequence],
        next_position=layout.next_position + shift,
        run_before=cache.continuation.visual_run.to(first.device),
    )


def _warn_beyond_window(
    spec: ModelSpec, config: InferenceConfig, next_position: Tensor, cache: CompressedCache
) -> None:
    """Once, when a prompt leaves the positions that the model was made for."""
    reached, window, positions = float(next_position.max()), spec.max_position_embeddings, config.positions
    covered = window if positions is None else positions.covered_positions(cache.rotary_length or reached, window)
    if reached <= covered or (cache.layers and float(cache.next_position.max()) > covered):
        return
    way = "a smaller delta" if fractional(config) else "V2PE, for example positions=V2PE(delta=1/16),"
    own_way = positions is not None and positions.long_prompt_advice
    scaled = "" if covered == window else f" and its frequencies are scaled for {covered:.0f}"
    warnings.warn(
        f"the prompt reaches rotary position {reached:.0f}, but the model was made for {window}{scaled}: answers "
        f"may break down; {own_way or f'{way} brings visual tokens closer together'}",
        stacklevel=2,
    )
