"""The one interface of every technique: settings in, checks before any forward pass, pure work on tensors."""

from mminfer.cells import CellGrid
from mminfer.technique.chance import draw_lot
from mminfer.technique.checks import check_columns, check_declared, checked_entries, compressed_layers, kept_rows
from mminfer.technique.entries import COLUMNS, CacheEntries, by_device, mean_length
from mminfer.technique.fetching import fetched
from mminfer.technique.registry import TechniqueRegistry, is_bundled
from mminfer.technique.replayed import NOTHING, EarlierEntries, ReplayedStretch, ReplayPlan
from mminfer.technique.row_hooks import only_rows
from mminfer.technique.settings import (
    CACHE_SHARES,
    MERGE_SHARES,
    MOST_COUNT,
    MOST_FACTOR,
    MOST_LAYERS,
    LayerRange,
    check_fraction,
    check_full_attention,
    check_layer,
    check_seed,
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
from mminfer.technique.tower import TowerTechnique
from mminfer.technique.views import KnownRows, LayerView, LayerWork

__all__ = [
    "CACHE_SHARES",
    "COLUMNS",
    "MERGE_SHARES",
    "MOST_COUNT",
    "MOST_FACTOR",
    "MOST_LAYERS",
    "NOTHING",
    "CacheEntries",
    "CacheTechnique",
    "CellGrid",
    "EarlierEntries",
    "KnownRows",
    "LayerRange",
    "LayerView",
    "LayerWork",
    "MergeTechnique",
    "PositionTechnique",
    "PruneTechnique",
    "ReplayPlan",
    "ReplayedStretch",
    "SkipTechnique",
    "Stage",
    "Technique",
    "TechniqueRegistry",
    "TowerTechnique",
    "by_device",
    "check_columns",
    "check_declared",
    "check_fraction",
    "check_full_attention",
    "check_layer",
    "check_seed",
    "checked_entries",
    "compressed_layers",
    "draw_lot",
    "fetched",
    "is_bundled",
    "is_number",
    "is_whole",
    "kept_rows",
    "layer_index",
    "mean_length",
    "only_rows",
]
