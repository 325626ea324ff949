"""FLOPs of a vision tower and its projector, from geometry and the inputs' shapes. One multiply-add is two FLOPs."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mminfer.errors import UnsupportedModelError
from mminfer.metrics.records import shares

if TYPE_CHECKING:
    from mminfer.models.adapter import ModelAdapter
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
