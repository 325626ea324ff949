"""The figures of one answer, as the report and the command line show them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mminfer.metrics.flops import full_prompt_flops, prompt_flops
from mminfer.metrics.memory import full_cache_bytes
from mminfer.metrics.records import PER_SEQUENCE, LayerRecord, PromptRecord, shares

if TYPE_CHECKING:
    from mminfer.models.spec import ModelSpec


@dataclass(frozen=True)
class GenerationStats:
    """What one answer took. Times and peak memory are of the whole call, which a batch shares.

    Args:
        prompt_tokens: tokens of the prompt (of this turn), placeholders counted as what they stand for.
        visual_tokens: visual ones among them.
        merged_tokens: tokens that entered the language model.
        layer_rows: rows that entered each layer.
        layer_entries: entries a head that each layer's cache held after the prompt: the mean, rounded, where its heads
            differ.
        head_entries: for each layer the entries of each head.
        layer_cache_bytes: of each layer, keys and values held after the prompt, and log-masses where there are any.
        cache_bytes: the same of all layers.
        full_cache_bytes: the same of the uncompressed model.
        prompt_flops: the language model's work on the prompt as it ran, techniques included; vision tower left out.
        full_prompt_flops: the same of the uncompressed model.
        vision_flops: the vision tower's and projector's work on the images as it ran; 0 where features came ready made.
        full_vision_flops: the same if every image went through the tower as it came.
        encoder_cache_hits: images and videos of the whole call that were encoded before, which a batch shares.
        new_tokens: tokens generated.
        allocated_bytes: memory that the cache of the whole call, all its rows together, took at the end: generated
            tokens, what the cache technique notes of each entry, padding and room for tokens to come.
        ttft_ms: from the call to the first token: preprocessing, vision tower and prompt pass.
        prompt_ms: the prompt pass alone.
        tpot_ms: mean time per token after the first, compiling left out; None with one token.
        compile_ms: time of the decoding steps in which something was compiled.
        peak_bytes: highest memory in use during the call.
        backends: which implementation each op ran with.
    """

    prompt_tokens: int
    visual_tokens: int
    merged_tokens: int
    layer_rows: tuple[int, ...]
    layer_entries: tuple[int, ...]
    head_entries: tuple[tuple[int, ...], ...]
    layer_cache_bytes: tuple[int, ...]
    cache_bytes: int
    full_cache_bytes: int
    prompt_flops: int
    full_prompt_flops: int
    vision_flops: int
    full_vision_flops: int
    encoder_cache_hits: int
    new_tokens: int
    allocated_bytes: int
    ttft_ms: float
    prompt_ms: float
    tpot_ms: float | None
    compile_ms: float
    peak_bytes: int
    backends: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class CallTimes:
    """Times and memory that a whole call shares; see `GenerationStats`."""

    allocated_bytes: int
    ttft_ms: float
    prompt_ms: float
    tpot_ms: float | None
    compile_ms: float
    peak_bytes: int
    backends: dict[str, str]


def stats_of(
    spec: ModelSpec, record: PromptRecord, sequence: int, new_tokens: int, element_size: int, times: CallTimes
) -> GenerationStats:
    """The figures of one sequence of a batch."""
    own = _own_record(record, sequence)
    tokens = own.prompt[0] + own.past[0]
    held = tuple(layer.cache_bytes(spec.head_dim, element_size) for layer in own.layers)
    return GenerationStats(
        prompt_tokens=own.prompt[0],
        visual_tokens=own.visual[0],
        merged_tokens=own.merged[0],
        layer_rows=tuple(layer.rows[0] for layer in own.layers),
        layer_entries=tuple(layer.entries[0] for layer in own.layers),
        head_entries=tuple(layer.head_entries[0] for layer in own.layers),
        layer_cache_bytes=held,
        cache_bytes=sum(held),
        full_cache_bytes=full_cache_bytes(spec, [tokens], element_size),
        prompt_flops=prompt_flops(spec, own),
        full_prompt_flops=full_prompt_flops(spec, own.prompt, own.past, own.pairs_ahead),
        vision_flops=sum(own.vision_flops),
        full_vision_flops=sum(own.full_vision_flops),
        encoder_cache_hits=own.encoder_cache_hits,
        new_tokens=new_tokens,
        **dataclasses.asdict(times),
    )


def _own_record(record: PromptRecord, sequence: int) -> PromptRecord:
    """One sequence's part; what merging took is shared out by visual tokens."""
    return PromptRecord(
        past=(record.past[sequence],),
        prompt=(record.prompt[sequence],),
        visual=(record.visual[sequence],),
        merged=(record.merged[sequence],),
        layers=[_own_layer(layer, sequence) for layer in record.layers],
        merge_flops=shares(record.merge_flops, record.visual)[sequence],
        pairs_ahead=record.pairs_ahead[sequence : sequence + 1],
        vision_flops=record.vision_flops[sequence : sequence + 1],
        full_vision_flops=record.full_vision_flops[sequence : sequence + 1],
        encoder_cache_hits=record.encoder_cache_hits,
    )


def _own_layer(layer: LayerRecord, sequence: int) -> LayerRecord:
    return LayerRecord(**{name: (getattr(layer, name)[sequence],) for name in PER_SEQUENCE})
