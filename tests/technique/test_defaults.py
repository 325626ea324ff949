"""What settings that nobody gives come to: saved configurations and the papers' figures rest on these."""

import pytest

from mminfer import (
    V2PE,
    AIMMerge,
    AIMPrune,
    Digest,
    DynamicNTK,
    LinearScaling,
    LookM,
    OperatorSkip,
    RegionMerge,
    Replay,
)
from mminfer.cache.h2o import H2O
from mminfer.cache.random_evict import RandomEvict
from mminfer.cache.snapkv import SnapKV
from mminfer.tokens.downsample import Downsample
from mminfer.tokens.fastv import FastV
from mminfer.tokens.random_prune import RandomPrune

PRUNE = {"start": 0.5, "end": 22 / 28, "temperature": 0.1, "iterations": 5}
EVICT = {
    "important_ratio": 0.1, "recent_ratio": 0.1, "merge": "pivot", "text_prior": True, "budget": None, "recent": None,
    "text_overflow": "evict", "queries": "all", "stride": 8, "window": 64,
}  # fmt: skip
DEFAULTS = {
    V2PE: {"delta": 0.0625, "window": None},
    LinearScaling: {"factor": "auto", "window": None},
    DynamicNTK: {"factor": 1.0, "length": None, "window": None},
    AIMMerge: {"ratio": 0.25, "across_frames": False, "reference_order": False},
    RegionMerge: {"threshold": 0.99, "largest": 4, "ratio": None, "across_frames": False},
    Downsample: {"ratio": 0.25},
    AIMPrune: PRUNE,
    RandomPrune: PRUNE | {"seed": 0},
    FastV: {"layer": 2, "ratio": 0.5},
    OperatorSkip: {"ffn": (), "attention": (), "block": ()},
    LookM: EVICT,
    H2O: EVICT | {"merge": "none", "text_prior": False},
    SnapKV: EVICT | {"merge": "none", "text_prior": False, "queries": "last", "window": 32, "pool": 5},
    RandomEvict: EVICT | {"merge": "none", "seed": 0},
    Digest: {
        "ratio": 0.2, "budget": None, "text_share": 0.5, "recent": 64, "contrast": 2.0, "queries": 64,
        "spread": "farthest", "join": True,
    },
    Replay: {
        "ratio": 0.3, "budget": None, "sure": None, "fit": 64, "stretch": 1024, "text": True, "alike": 1.0,
        "fast": False, "by_output": True,
    },
}  # fmt: skip


@pytest.mark.parametrize("technique", DEFAULTS, ids=lambda technique: technique.__name__)
def test_settings_that_nobody_gives(technique):
    given = vars(technique())
    assert {name: given[name] for name in DEFAULTS[technique]} == DEFAULTS[technique]
