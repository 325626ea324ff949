"""What was done, in sentences."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mminfer.inspection.facts import ImageFacts, Inspection


def percent(part: float, whole: float) -> str:
    """A share, with a digit behind the point where it is near nothing or near all; it never breaks over a line."""
    share = 100 * part / whole if whole else 0.0
    return f"{share:.1f}\u00a0%" if 0 < share < 10 or 99 <= share < 100 else f"{share:.0f}\u00a0%"


def layer_list(layers: Sequence[int]) -> str:
    """Neighbours told as a range: 0, 2, 4 to 7."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and runs[-1][-1] == layer - 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(f"{run[0]} to {run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs)


def image_names(inspection: Inspection) -> list[str]:
    """Image 1, Image 2, Frame 1, ...: each kind counted by itself."""
    counts: dict[str, int] = {}
    names = []
    for facts in inspection.images:
        counts[facts.kind] = counts.get(facts.kind, 0) + 1
        names.append(f"{facts.kind.capitalize()} {counts[facts.kind]}")
    return names


def sentences(inspection: Inspection) -> list[str]:
    """One for each technique that is on."""
    tell = {"tower": _tower, "positions": _positions, "merge": _merge, "prune": _prune, "skip": _skip, "cache": _cache}
    on = [(data["technique"], tell[stage]) for stage, data in inspection.settings.items() if data is not None]
    return [f"{name}: {of(inspection)}" for name, of in on] or ["Nothing: every technique is off."]


def image_sentence(inspection: Inspection, facts: ImageFacts) -> str:
    """What became of one image."""
    tokens = inspection.tokens
    owners = np.unique(tokens.owner[facts.tokens])
    said = [f"{len(facts.tokens)} patches"]
    if len(owners) < len(facts.tokens):
        said[0] += f" as {len(owners)} {_tokens(len(owners))}"
    left = [(layer, int((tokens.left[owners] == layer).sum())) for layer in inspection.leaving_layers]
    said += [f"{count} left behind layer {layer}" for layer, count in left if count]
    if left and not any(count for _, count in left):
        said.append("all go through every layer")
    if inspection.evicts:
        had = int(tokens.present[:, owners].sum()) * tokens.num_heads
        said.append(f"{percent(int(tokens.gone[:, owners].sum()), had)} of its cache entries evicted")
    if len(facts.grids) > 1:
        said.append("shown as a whole and in tiles")
    return ", ".join(said)


def _tokens(count: int) -> str:
    return "token" if count == 1 else "tokens"


def _tower(inspection: Inspection) -> str:
    stats, patches = inspection.stats, inspection.tokens.is_patch
    repeats = int(inspection.tokens.unencoded.sum())
    share = percent(stats.vision_flops, stats.full_vision_flops)
    if repeats:
        return (
            f"{repeats:,} of {int(patches.sum()):,} visual tokens repeat others, which stand for them; the vision "
            f"tower and projector spent {share} of their FLOPs."
        )
    return f"every visual token stays; the vision tower and projector spent {share} of their FLOPs."


def _positions(inspection: Inspection) -> str:
    now, before = inspection.last_position, inspection.full_last_position
    if now == before:
        return f"positions stay as the model has them, up to {before:,.0f}; the rotary frequencies change."
    return (
        f"visual tokens stand closer together; the prompt ends at rotary position {now:,.0f} instead of {before:,.0f}."
    )


def _merge(inspection: Inspection) -> str:
    stats = inspection.stats
    removed = stats.prompt_tokens - stats.merged_tokens
    visual = stats.visual_tokens - int(inspection.tokens.unencoded.sum())
    removed -= stats.visual_tokens - visual
    return (
        "patches of a picture were averaged into fewer tokens before the language model; "
        f"{visual:,} visual tokens became {visual - removed:,}."
    )


def _prune(inspection: Inspection) -> str:
    leaving = inspection.leaving_layers
    if not leaving:
        return "no visual token left."
    left = ", ".join(f"{inspection.layers[i].left:,} behind layer {i}" for i in leaving)
    return f"visual tokens left inside the language model: {left}. They exist in no later layer or cache."


def _skip(inspection: Inspection) -> str:
    layers = inspection.layers
    parts = []
    for operator, what in (("FFN", "the FFN"), ("queries", "asking (their queries)")):
        of = [i for i, layer in enumerate(layers) if operator in layer.skipped]
        if of:
            parts.append(f"{what} in {'layer' if len(of) == 1 else 'layers'} {layer_list(of)}")
    return f"visual tokens skip {' and '.join(parts)}." if parts else "no layer skips anything."


def _cache(inspection: Inspection) -> str:
    held = sum(sum(layer.head_entries) for layer in inspection.layers)
    had = sum(layer.rows * len(layer.head_entries) for layer in inspection.layers)
    return (
        f"behind the prompt {percent(held, had)} of the cache entries stayed, {inspection.evicted}. "
        "The first token of the answer comes before that; only later ones can change by it."
    )
