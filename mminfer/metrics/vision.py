"""FLOPs of a vision tower and its projector, from geometry and the inputs' shapes. One multiply-add is two FLOPs."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mminfer.errors import UnsupportedModelError
from mminfer.metrics.records import PromptRecord, shares

if TYPE_CHECKING:
    from mminfer.models.adapter import ModelAdapter
    from mminfer.models.encoding import Encoded
    from mminfer.models.vision import VisionTower, VisionWork


@dataclass(frozen=True)
class VisionFlops:
    """What encoding images took, by operator.

    Args:
        patches: the convolution that makes patches rows.
        projections: queries, keys, values and outputs of the attention, over all layers.
        attention: queries times keys, and probabilities times values.
        ffn: over all layers.
        pooling: a pooling head of the tower, where the host runs one.
        projector: what brings rows into the language model, mergers included.
    """

    patches: int = 0
    projections: int = 0
    attention: int = 0
    ffn: int = 0
    pooling: int = 0
    projector: int = 0

    @property
    def total(self) -> int:
        """All operators together."""
        return sum(dataclasses.astuple(self))

    def __add__(self, other: VisionFlops) -> VisionFlops:
        return VisionFlops(*map(sum, zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))


def vision_flops(adapter: ModelAdapter, inputs: Mapping[str, Any]) -> VisionFlops:
    """What encoding these inputs takes; nothing where features come ready made.

    Args:
        adapter: the host model.
        inputs: its inputs.

    Raises:
        UnsupportedModelError: a vision tower of unknown build.
    """
    total = VisionFlops()
    for work in adapter.vision_work(inputs):
        total += tower_flops(adapter.tower, work)
    return total


def encoded_flops(adapter: ModelAdapter, encoded: Encoded) -> VisionFlops:
    """What encoding these pictures took; errors as of `vision_flops`."""
    total = VisionFlops()
    for call in encoded.calls:
        work = adapter.tower.work(call.modality, call.inputs) if call.ragged is None else call.ragged
        total += tower_flops(adapter.tower, work)
    return total


def note_vision(adapter: ModelAdapter, record: PromptRecord, inputs: Mapping[str, Any], encoded: Encoded) -> None:
    """Notes in a pass's record what its pictures took.

    Args:
        adapter: the host model.
        record: of the pass.
        inputs: its inputs.
        encoded: the pictures.
    """
    record.full_vision_flops = vision_shares(adapter, {**encoded.pixels, **inputs}, record.visual, encoded.copies)
    record.encoder_cache_hits = encoded.hits
    whole = len(encoded.units) == len(encoded.calls) and all(call.ragged is None for call in encoded.calls)
    if whole and not encoded.hits:
        record.vision_flops = record.full_vision_flops
    elif record.full_vision_flops:  # else of unknown build, which was said already
        record.vision_flops = _shared(encoded_flops(adapter, encoded).total, record.visual, encoded.copies)


def vision_shares(
    adapter: ModelAdapter, inputs: Mapping[str, Any], visual: Sequence[int], copies: int = 1
) -> tuple[int, ...]:
    """The total of `vision_flops` for each sequence, by its visual tokens; () where there is nothing to encode.

    Args:
        adapter: the host model.
        inputs: its inputs.
        visual: visual tokens of each sequence.
        copies: how many sequences in a row share their images.
    """
    try:
        total = vision_flops(adapter, inputs).total
    except UnsupportedModelError as error:
        warnings.warn(f"{error}; they are reported as 0", stacklevel=2)
        return ()
    return _shared(total, visual, copies)


def _shared(total: int, visual: Sequence[int], copies: int) -> tuple[int, ...]:
    of_each = shares(total, visual[::copies]) if total else ()
    return tuple(flops for flops in of_each for _ in range(copies))


def tower_flops(tower: VisionTower, work: VisionWork) -> VisionFlops:
    """One call of the host's encoder."""
    attention = [tower.attention_weights(layer) for layer in tower.layers]
    layers = [tower.layer_weights(layer) for layer in tower.layers]
    return VisionFlops(
        patches=2 * tower.patch_weights * work.patches,
        projections=2 * sum(attention) * work.rows,
        attention=4 * tower.width * sum(work.pairs),
        ffn=2 * (sum(layers) - sum(attention)) * work.rows,
        pooling=tower.pooling_flops(work),
        projector=2 * tower.projector_weights * work.projected,
    )
