"""A cache that remembers what can be asked: entries are worth what their own context asks of them a second time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, ClassVar, Self

import torch
from torch import Tensor

from mminfer.cache.digest_rules import runs_of
from mminfer.cache.replay_fresh import head_by_head, nothing_before, scored, select_together
from mminfer.cache.replay_parts import fitted_together
from mminfer.cache.replay_rules import (
    BELOW,
    FOR_PICTURE,
    LEAST,
    asked_for,
    at_rest,
    one_for_each,
    run_numbers,
    shared_choice,
    side_by_side,
    with_scores,
)
from mminfer.errors import ConfigError, InputError, shown
from mminfer.technique import (
    CACHE_SHARES,
    CacheEntries,
    CacheTechnique,
    LayerView,
    ReplayedStretch,
    ReplayPlan,
    check_fraction,
    is_number,
    is_whole,
)

if TYPE_CHECKING:
    from mminfer.layout import TokenLayout
    from mminfer.models.spec import ModelSpec

ALWAYS = 2.0  # what is added to the score of a sequence's first entry


@dataclass(frozen=True)
class Replay(CacheTechnique):
    """Entries are worth the most attention that their own context gives them when it is gone through once more.

    Behind a pass, its rows go through the layers again, a picture at a time, and each entry's score is the largest
    share of its attention that any row gives to it: nothing of a question is needed, and what no row can find again no
    question will. One budget is shared by score over all layers and heads, so that a head keeps as many entries as it
    is asked for; each is sure of a part of an even share, and so are the first entry of each head and one entry in
    each layer of every picture. Those that stay are then fitted so that the replayed queries read among them what they
    read among all: how much each weighs (a log-mass that attention adds to its logit), and its value. Scores stay with
    the entries: later passes compete with earlier ones. Generated tokens, which no replay has judged, take the others'
    scores by age.

    Args:
        ratio: entries kept, as a fraction of the tokens that the layers took in, in (0, 1].
        budget: entries of the average head, in place of the ratio.
        sure: of an even share, what every head is sure of, in [0, 1]; None: twice the part of all entries that stays, a
            half at most.
        fit: queries of a stretch, in each query head, to which entries are fitted; 0: they stay as they are.
        stretch: entries that a row looks at: those of its own stretch of so many rows and the first of all; in a
            shorter turn those that were held before fill it up.
        text: whether rows of text go by again too where there are pictures beside them.
        alike: rows of a picture that are as like the one before them, by the cosine of what enters the layers, do not
            go by again; in [0, 1], 1: all do.
        fast: let every layer look with the rows as they entered it the first time: no FFN runs again.
        by_output: a share of attention counts as much as the entry writes with it, by its value behind the layer's
            output projection; False: shares alone.

    Raises:
        ConfigError: a setting is out of range.

    Reference:
        Scores by replaying: KVzip (arXiv 2505.23416) section 3, whose replay is one repetition of the whole context.
        What entries write: KVzip+ of kvpress, after CriticalKV (arXiv 2502.03805). One threshold for all heads: AdaKV
        (arXiv 2407.11550). Fitting: Attention Matching (arXiv 2602.16284). Replaying by pictures, and the fast form,
        are ours.
    """

    ratio: float = 0.3
    budget: int | None = None
    sure: float | None = None
    fit: int = 64
    stretch: int = 1024
    text: bool = True
    alike: float = 1.0
    fast: bool = False
    by_output: bool = True

    across_layers: ClassVar[bool] = True
    by_head: ClassVar[bool] = True
    columns: ClassVar[tuple[str, ...]] = ("is_visual", "score")

    def __post_init__(self) -> None:
        check_fraction("Replay.ratio", self.ratio)
        if self.budget is not None and not is_whole(self.budget, least=1):
            raise ConfigError(f"Replay.budget={shown(self.budget)}, wanted a number of entries, 1 or more, or None")
        if self.sure is not None and (not is_number(self.sure, most=1) or self.sure < 0):
            raise ConfigError(f"Replay.sure={shown(self.sure)}, wanted a part from 0 to 1, or None")
        if not is_whole(self.fit, least=0):
            raise ConfigError(f"Replay.fit={shown(self.fit)}, wanted a number of queries, 0 or more")
        if not is_whole(self.stretch, least=64):
            raise ConfigError(f"Replay.stretch={shown(self.stretch)}, wanted a number of rows, 64 or more")
        if not is_number(self.alike, most=1) or self.alike < 0:
            raise ConfigError(f"Replay.alike={shown(self.alike)}, wanted a cosine from 0 to 1")
        for name in ("text", "fast", "by_output"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"Replay.{name}={shown(getattr(self, name))}, wanted True or False")

    @property
    def replay(self) -> ReplayPlan:
        own = {name: getattr(self, name) for name in ("stretch", "text", "alike", "fast")}
        return ReplayPlan(**own, references=self.fit, outputs=self.by_output)

    def check_prompt(self, layout: TokenLayout, spec: ModelSpec, tokens_seen: Sequence[int]) -> None:
        heads = spec.num_key_value_heads
        for sequence, (start, stop) in enumerate(layout.spans):
            pictures, tokens = len(runs_of(layout.on_host.is_visual[start:stop])), tokens_seen[sequence] + stop - start
            share = self.ratio * tokens if self.budget is None else self.budget
            if pictures and share < tokens and pictures + heads > max(int(share * heads), heads):
                raise InputError(
                    f"Replay: {share:.4g} entries a head for {pictures} pictures of sequence {sequence}, wanted one in "
                    f"each layer for every picture beside the first of {heads} heads: raise ratio or budget"
                )

    def apply(self, view: LayerView) -> CacheEntries:
        """All of them: rows are replayed behind the last layer only."""
        return view.entries

    def compress_replayed(
        self,
        layers: Sequence[CacheEntries],
        replayed: Sequence[Sequence[ReplayedStretch]],
        tokens_seen: Sequence[int],
    ) -> list[CacheEntries]:
        scores, counts = _scores_of_new(layers, replayed)
        alone = nothing_before(layers, counts)
        judged = list(layers) if alone else with_scores(layers, scores.split(counts, 1))
        flat = head_by_head(scores, counts) if alone else side_by_side([_flat_scores(entries) for entries in judged])
        heads = len(layers[0].lengths)
        whole = sum(tokens_seen) * self.ratio if self.budget is None else self.budget * len(layers)
        total = max(int(whole * heads), heads * len(layers))
        sure = min(0.5, 2 * whole / max(sum(tokens_seen), 1)) if self.sure is None else self.sure
        keep = shared_choice(flat, [length for entries in judged for length in entries.lengths], total, sure)
        if alone:
            judged = scored(judged, flat)
        if bool(keep.all()):
            return [at_rest(entries) for entries in judged]
        flags = keep.split([entries.total for entries in judged])
        if alone:
            kept = select_together(judged, keep, flat)
        else:
            of_layers = zip(judged, flags, strict=True)
            kept = [at_rest(entries.select_heads(own.view(entries.keys.shape[:3]))) for entries, own in of_layers]
        return fitted_together(judged, replayed, flags, kept) if self.fit else kept

    def describe(self) -> str:
        entries = f"{100 * self.ratio:g} % of the entries" if self.budget is None else f"{self.budget:,} entries a head"
        how = "as every layer saw it" if self.fast else "a picture at a time"
        return (
            f"Keeps {entries}, those that the context itself asks for when it is gone through once more, {how}, shared "
            f"out over all layers and heads; {self.describe_evicted()}."
        )

    def describe_evicted(self) -> str:
        return "what stayed was fitted to make up for the rest" if self.fit else "the rest was dropped"

    @classmethod
    def presets(cls) -> dict[str, Self]:
        # For chats, streams and cached documents, whose questions come later.
        return {
            "replay-50": cls(ratio=0.5),
            "replay-30": cls(ratio=0.3),
            "replay-20": cls(ratio=0.2),
            "replay-8k": cls(budget=8192),
            "replay-fast-30": cls(ratio=0.3, fast=True),
        }

    @classmethod
    def sweeps(cls) -> dict[str, dict[str, Self]]:
        return {
            "Replay": {f"{share} %": cls(share / 100) for share in CACHE_SHARES},
            "Replay, fast": {f"{share} %": cls(share / 100, fast=True) for share in CACHE_SHARES},
        }


def _scores_of_new(
    layers: Sequence[CacheEntries], replayed: Sequence[Sequence[ReplayedStretch]]
) -> tuple[Tensor, list[int]]:
    """[G, N] float32: scores of the entries that are new, layer behind layer; and how many of them each layer has."""
    if not all(replayed):
        raise ValueError("a layer of which nobody has replayed a row")
    peaks = asked_for([stretch for looked in replayed for stretch in looked]).nan_to_num_(0.0)  # of a model giving nan
    counts, groups = [looked[-1].last for looked in replayed], peaks.shape[0]
    run = run_numbers([_is_visual(entries, count) for entries, count in zip(layers, counts, strict=True)])
    fresh = peaks.clamp_(LEAST, BELOW) + FOR_PICTURE * one_for_each(peaks, run.to(peaks.device))
    ends = zip(accumulate(counts), counts, layers, strict=True)
    first = [end - count for end, count, entries in ends if entries.total == groups * count]  # nothing came before
    always = torch.zeros(fresh.shape[1], dtype=torch.float32).index_fill_(
        0, torch.tensor(first, dtype=torch.int64), ALWAYS
    )
    fresh += always.to(fresh.device, non_blocking=True)
    return fresh, counts


def _flat_scores(entries: CacheEntries) -> Tensor:
    if entries.score is None:
        raise ValueError("entries without scores")
    return entries.score.float().flatten()


def _is_visual(entries: CacheEntries, count: int) -> Tensor:
    """[count] bool, of the last entries of each head."""
    is_visual = entries.heads()[0].is_visual
    if is_visual is None:
        raise ValueError("entries that do not know what is visual")
    return is_visual[0, 0, -count:]
