"""The one interface of every technique: settings in, checks before any forward pass, pure work on tensors."""

from mminfer.technique.chance import draw_lot
from mminfer.technique.settings import (
    LayerRange,
    check_fraction,
    check_full_attention,
    check_layer,
    is_number,
    is_whole,
    layer_index,
)
from mminfer.technique.stages import (
    CacheTechnique,
    MergeTechnique,
    PositionTechnique,
    PruneTechnique,
    SkipTechnique,
    Stage,
    Technique,
)
from mminfer.technique.views import COLUMNS, CacheEntries, LayerWork

__all__ = [
    "COLUMNS",
    "CacheEntries",
    "CacheTechnique",
    "LayerRange",
    "LayerWork",
    "MergeTechnique",
    "PositionTechnique",
    "PruneTechnique",
    "SkipTechnique",
    "Stage",
    "Technique",
    "check_fraction",
    "check_full_attention",
    "check_layer",
    "draw_lot",
    "is_number",
    "is_whole",
    "layer_index",
]
