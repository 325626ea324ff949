"""AIM's FLOPs: of LLaVA-OneVision-7B on 32 frames, of LLaVA-1.5-7B on an image.

Reference:
    arXiv 2412.03248, Table 1, its ablations and Tables C to E; token counts and the rows of each layer are those of the
    counting scripts in the authors' repository (LaVi-Lab/AIM, other_packages/LLM-Viewer).
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from benchmarks.paper.figure import Figure
from benchmarks.paper.geometries import QWEN2_7B, VICUNA_7B, record_of
from mminfer import AIMMerge, AIMPrune
from mminfer.metrics.flops import causal_pairs, prompt_flops
from mminfer.models.spec import ModelSpec
from mminfer.tokens.prune import aim_schedule

PAPER = "AIM (arXiv 2412.03248)"
FRAMES, PER_FRAME, TEXT = 32, 196, 100
IMAGE_TOKENS, IMAGE_TEXT = 576, 40
# Visual tokens of a frame that merging leaves, by round; published FLOPs of the whole prompt in 10^12.
MERGED = {"100 %": (196, 99.63), "50 %": (98, 46.48), "25 %": (49, 22.90), "12.5 %": (24, 11.64), "3.1 %": (6, 3.85)}
PRUNED = {(14, 22): 14.76, (7, 22): 12.01, (14, 15): 12.10, (7, 8): 6.71}
DENSE = "prompt FLOPs, dense attention"
CAUSAL = "prompt FLOPs, causal attention"
RULE = "2 FLOPs a multiply-add, grouped heads, gated FFN; norms and softmax, which the paper's tool counts, left out"


def pruned_rows(layers: int, visual: int, text: int, start: int, end: int, behind: bool) -> list[int]:
    """Rows of each layer.

    Args:
        layers: depth.
        visual: visual tokens that enter.
        text: tokens that always stay.
        start, end: the schedule's.
        behind: tokens leave behind their layer, as `AIMPrune` removes them; else before it, as the authors count.
    """
    kept = aim_schedule(layers, start, end)
    rates = [1.0, *kept[:-1]] if behind else kept
    return [int(visual * rate) + text for rate in rates]


def figures() -> Iterator[Figure]:
    """All of them."""
    for kept, (tokens, published) in MERGED.items():
        setting = f"32 frames, merged to {kept}"
        rows = [FRAMES * tokens + TEXT] * QWEN2_7B.num_layers
        rounding = "; 24.5 tokens a frame taken as 24" if tokens == 24 else ""
        yield from _both("Table 1 and ablation of merging", QWEN2_7B, setting, rows, published, RULE + rounding)
    for figure in _both("Table E", QWEN2_7B, "128 frames", [18_532] * 28, 381.09, f"18,532 tokens by a script; {RULE}"):
        yield replace(figure, model="LongVA-7B")
    yield from _pruned()
    yield from _image()
    yield from _own_work()


def _both(
    table: str, spec: ModelSpec, setting: str, rows: Sequence[int], published: float, how: str
) -> Iterator[Figure]:
    """Dense as published, and causal."""
    model = "LLaVA-OneVision-7B" if spec is QWEN2_7B else "LLaVA-1.5-7B"
    dense = Figure(PAPER, table, model, setting, DENSE, "TFLOP", published, _flops(spec, rows, dense=True), how)
    yield dense
    yield replace(
        dense,
        quantity=CAUSAL,
        ours=_flops(spec, rows),
        how="only pairs that causal attention looks at; the paper counts every query against every key",
    )


def _pruned() -> Iterator[Figure]:
    visual = FRAMES * 49
    for (start, end), published in PRUNED.items():
        table = "Table 1" if (start, end) == (14, 22) else "ablation of pruning"
        setting = f"32 frames, merged to 25 %, pruned from {start} to {end}"
        rows = pruned_rows(28, visual, TEXT, start, end, behind=False)
        yield from _both(table, QWEN2_7B, setting, rows, published, f"rows by the authors' script; {RULE}")
        rows = pruned_rows(28, visual, TEXT, start, end, behind=True)
        (dense, _) = _both(table, QWEN2_7B, setting, rows, published, "")
        yield replace(
            dense,
            quantity=f"{DENSE}, rows of AIMPrune",
            how="a token whose importance a layer gives has gone through that layer: each step comes a layer later "
            "than in the authors' count",
        )
    rows = pruned_rows(28, 192 * 49, TEXT, 14, 22, behind=False)
    setting = "192 frames, merged to 25 %, pruned from 14 to 22"
    yield from _both("Table 1", QWEN2_7B, setting, rows, 99.27, f"rows by the authors' script; {RULE}")


def _image() -> Iterator[Figure]:
    table = "table of image benchmarks"
    whole = [IMAGE_TOKENS + IMAGE_TEXT] * 32
    yield from _both(table, VICUNA_7B, "one image", whole, 8.18, f"40 text tokens by the script; {RULE}")
    rows = pruned_rows(32, IMAGE_TOKENS // 8, IMAGE_TEXT, 13, 21, behind=False)
    (dense, _) = _both(table, VICUNA_7B, "one image, merged to 12.5 %, pruned from 13 to 21", rows, 2.22, "")
    how = "not reproduced: the stated default of images cannot give it; the paper's 2.22 must be of another setting"
    yield replace(dense, how=how)


def _own_work() -> Iterator[Figure]:
    """What the techniques themselves take."""
    setting = "32 frames, merged to 25 %, pruned from 14 to 22"
    whole = AIMMerge(0.25).cost(QWEN2_7B, [FRAMES * PER_FRAME])
    merging = Figure(
        PAPER, "overhead of the method", "LLaVA-OneVision-7B", setting, "merging, matched over all frames", "GFLOP",
        88.25, whole / 1e9, "as the authors' script counts it, but for norms and means",
    )  # fmt: skip
    yield merging
    within = AIMMerge(0.25).cost(QWEN2_7B, [PER_FRAME] * FRAMES)
    yield replace(
        merging, quantity="merging, matched within frames", ours=within / 1e9,
        how="the method never matches across frames, so a 32nd of the products is needed",
    )  # fmt: skip
    prune, rows = AIMPrune(14, 22), pruned_rows(28, FRAMES * 49, TEXT, 14, 22, behind=True)
    asked = [n for i, n in enumerate(rows) if prune.prunes(i, 28) and prune.schedule(28)[i] > 0]
    yield replace(
        merging, quantity="importance of tokens", published=4.18,
        ours=prune.cost(QWEN2_7B, [causal_pairs(n, 0) for n in asked]) / 1e9,
        how="ours forms the logits again, of causal pairs; the authors take them from the attention, but count softmax",
    )  # fmt: skip


def _flops(spec: ModelSpec, rows: Sequence[int], dense: bool = False) -> float:
    return prompt_flops(spec, record_of(rows), dense) / 1e12
