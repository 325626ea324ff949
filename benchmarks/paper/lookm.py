"""LOOK-M's memory of the cache, by its budget.

Reference:
    arXiv 2406.18139, Table 4: means over 20 samples of MileBench; whose model is not said.
"""

from collections.abc import Iterator

from benchmarks.paper.figure import Figure
from benchmarks.paper.geometries import VICUNA_7B
from mminfer import LookM
from mminfer.metrics.memory import full_cache_bytes

PAPER = "LOOK-M (arXiv 2406.18139)"
FULL_GIB = 1.52
PUBLISHED = {20: 0.32, 5: 0.13}
HALF = 2  # bytes an element


def tokens() -> int:
    """Tokens whose keys and values fill the full cache."""
    return round(FULL_GIB * 2**30 / full_cache_bytes(VICUNA_7B, [1], HALF))


def figures() -> Iterator[Figure]:
    """All of them."""
    count = tokens()
    yield _figure("full cache", FULL_GIB, count, f"float16; {count:,} tokens are inferred from this row")
    for percent, published in PUBLISHED.items():
        kept = sum(LookM(percent / 200, percent / 200).quota(count, 0))
        held = round(published * 2**30 / full_cache_bytes(VICUNA_7B, [1], HALF))
        how = (
            f"half of the budget each for important and recent entries: {kept} entries a head. The paper's are {held}: "
            "text always stays, so a sample with more text than the budget holds more, and new tokens come on top"
        )
        yield _figure(f"budget {percent} %", published, kept, how)


def _figure(setting: str, published: float, entries: int, how: str) -> Figure:
    gib = full_cache_bytes(VICUNA_7B, [entries], HALF) / 2**30
    return Figure(PAPER, "Table 4", "LLaVA-1.5-7B (inferred)", setting, "keys and values", "GiB", published, gib, how)
