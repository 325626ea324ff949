"""What an inspection found, as plain data: all that pages and pictures are drawn from."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mminfer.metrics.stats import GenerationStats

Rows = NDArray[np.int64]
Mask = NDArray[np.bool_]
Floats = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class TokenFacts:
    """The T tokens of the prompt as it came in, and what became of them in L layers of G key/value heads.

    Args:
        image: [T] place in `Inspection.images`; -1 for text.
        is_patch: [T], whether a token stands for a patch; text and newlines of an image do not.
        owner: [T], the token that each became part of by merging; its own number where it stays.
        size: [T] float32, patches (or text tokens) that each stands for after merging; 0 where merged away.
        present: [L, T], whether a row of its own entered the layer.
        left: [T], the layer behind which its row left; -1 where it went through all of them or was merged away.
        held: [L, T], heads that hold the token's entry after the prompt.
        num_heads: G.
        importance: [T] float32 that shades the pictures; nan where there is none.
        unencoded: [T], whether the patches of a token never went through the vision tower.
    """

    image: Rows
    is_patch: Mask
    owner: Rows
    size: Floats
    present: Mask
    left: Rows
    held: Rows
    num_heads: int
    importance: Floats
    unencoded: Mask

    def __len__(self) -> int:
        return len(self.image)

    @property
    def num_layers(self) -> int:
        return len(self.present)

    @cached_property
    def layers_entered(self) -> Rows:
        """[T], how many layers the token that each is part of went through."""
        entered: Rows = self.present.sum(0)[self.owner]
        return entered

    @cached_property
    def gone(self) -> Rows:
        """[L, T], heads that held an entry of the token that each is part of, and do so no longer."""
        gone: Rows = (self.present * self.num_heads - self.held)[:, self.owner]
        return gone

    @cached_property
    def evicted(self) -> Floats:
        """[T] in 0..1: of the layers and heads that had an entry of the token, the share in which it is gone."""
        had = np.maximum(self.layers_entered * self.num_heads, 1)
        return (self.gone.sum(0) / had).astype(np.float32)

    @cached_property
    def group(self) -> Rows:
        """[T], number of the merged group that a token is in, counted in the image where it stands; -1: in none."""
        stands = np.flatnonzero((np.bincount(self.owner, minlength=len(self)) > 1) & (self.image >= 0))
        number = np.full(len(self), -1, np.int64)
        for image in np.unique(self.image[stands]):
            own = stands[self.image[stands] == image]
            number[own] = np.arange(len(own))
        return number[self.owner]

    @cached_property
    def rank(self) -> Floats:
        """[T] in 0..1: place of the token that each is part of, by importance among the visual ones; nan: unknown."""
        rank = np.full(len(self), np.nan, np.float32)
        own = np.flatnonzero((self.image >= 0) & np.isfinite(self.importance))
        order = self.importance[own].argsort(kind="stable").argsort(kind="stable")
        rank[own] = order / max(len(own) - 1, 1)
        return rank[self.owner]


@dataclass(frozen=True, eq=False)
class ImageFacts:
    """An image, tile or frame as the language model saw it.

    Args:
        kind: "image" or "frame".
        grids: where its patches lie: [h, w] each, numbers of tokens. LLaVA-NeXT shows an image twice, once as a
            whole and once in tiles.
        picture: what the patches show; None where it is not known.
    """

    kind: str
    grids: tuple[Rows, ...]
    picture: Image.Image | None = None

    @cached_property
    def tokens(self) -> Rows:
        """Numbers of its patches' tokens, ascending."""
        return np.sort(np.concatenate([grid.ravel() for grid in self.grids]))


@dataclass(frozen=True)
class LayerFacts:
    """One layer, beside that of the full model; bytes are of keys and values.

    Args:
        rows: rows that entered.
        left: tokens that left behind it.
        entries: entries a head that its cache holds after the prompt: the mean, rounded, where its heads differ.
        head_entries: those of each head.
        skipped: operators that visual tokens skipped.
    """

    rows: int
    full_rows: int
    left: int
    entries: int
    head_entries: tuple[int, ...]
    full_entries: int
    cache_bytes: int
    full_cache_bytes: int
    skipped: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Inspection:
    """One prompt, what was done to it, and what came of it.

    Args:
        model: its name.
        settings: `InferenceConfig.to_dict()`.
        images: in the order of the prompt.
        tokens: facts of every token.
        texts: [T] what each text token says; "" for visual ones.
        layers: one each.
        answer, full_answer: with these settings, and of the full model.
        first_token_kl: divergence of the first token's distributions, in nats.
        stats, full_stats: figures of the two runs.
        importance_from: what the importance is; "" where there is none.
        evicted: what became of cache entries that did not stay, as the end of a sentence; "" without a cache technique.
        last_position, full_last_position: rotary positions that the prompt reaches, with the settings and without.
    """

    model: str
    settings: dict[str, Any]
    images: tuple[ImageFacts, ...]
    tokens: TokenFacts
    texts: tuple[str, ...]
    layers: tuple[LayerFacts, ...]
    answer: str
    full_answer: str
    first_token_kl: float
    stats: GenerationStats
    full_stats: GenerationStats
    importance_from: str
    evicted: str
    last_position: float
    full_last_position: float

    @property
    def evicts(self) -> bool:
        """Whether any entry was evicted."""
        return bool(self.tokens.gone.any())

    @cached_property
    def some_stay(self) -> bool:
        """Whether any visual token goes through all layers."""
        tokens = self.tokens
        return bool((tokens.left[tokens.owner[tokens.is_patch]] < 0).any())

    @property
    def leaving_layers(self) -> tuple[int, ...]:
        """Layers behind which tokens left."""
        return tuple(i for i, layer in enumerate(self.layers) if layer.left)
