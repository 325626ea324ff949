"""What every figure must beat: chance, down-sampling and three published rules, with the techniques' own interface."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from mminfer_kernels import column_mass, merge_rows
from torch import Tensor
from torch.nn.functional import avg_pool1d

from mminfer.cache.lookm import LookM
from mminfer.cache.lookm_rules import SINKS
from mminfer.errors import ConfigError
from mminfer.layout import TokenLayout
from mminfer.technique import LayerWork, MergeTechnique, PruneTechnique, check_fraction, check_layer, is_whole
from mminfer.tokens.grid import image_views, patch_places
from mminfer.tokens.prune import AIMPrune, aim_keep

if TYPE_CHECKING:
    from mminfer.models.base import ModelSpec


@dataclass(frozen=True)
class Downsample(MergeTechnique):
    """Plain down-sampling: every view of an image, a grid of tokens, is averaged down to a smaller grid.

    A token stands where the middle one of those stood that it is the mean of. Where tokens form no grid (see
    `patch_places`), runs of them are averaged.

    Args:
        ratio: kept fraction of an image's tokens, in (0, 1]; at least one token stays, and no more than this.

    Raises:
        ConfigError: the ratio is out of range.
    """

    ratio: float = 0.25

    def __post_init__(self) -> None:
        check_fraction("Downsample.ratio", self.ratio)

    def check(self, spec: ModelSpec) -> None:
        """Any model will do."""

    def apply(self, inputs_embeds: Tensor, layout: TokenLayout) -> tuple[Tensor, TokenLayout]:
        rows, views = torch.arange(len(layout), device=inputs_embeds.device), image_views(layout)
        if self.ratio == 1 or not views:
            return inputs_embeds, layout
        owner = rows.clone()
        for view in views:
            owner[view] = view[self._owners(view, layout)]
        stays = owner == rows
        index, gone = stays.nonzero()[:, 0], (~stays).nonzero()[:, 0]
        target, weight = torch.searchsorted(index, owner[gone]), layout.size.where(layout.size > 0, 1)
        embeds, _ = merge_rows(inputs_embeds[index], inputs_embeds[gone], target, weight[index], weight[gone])
        size = layout.size[index].index_add(0, target, layout.size[gone])
        return embeds, layout.merge(index, size, owner)

    def _owners(self, rows: Tensor, layout: TokenLayout) -> Tensor:
        """[n] int64: for each token of a view the one, among its n, that it becomes part of."""
        y, x = patch_places(rows, layout)
        height, width = int(y.max()) + 1, int(x.max()) + 1
        tall, wide = _smaller_grid(height, width, max(1, int(self.ratio * len(rows) + 1e-9)))
        cell = (y * tall // height) * wide + x * wide // width
        _, cell, counts = cell.unique(return_inverse=True, return_counts=True)
        order = cell.argsort(stable=True)
        middle = counts.cumsum(0) - counts + counts // 2
        return order[middle][cell]


def _smaller_grid(height: int, width: int, tokens: int) -> tuple[int, int]:
    """Rows and columns of a grid of at most so many tokens: near their number, and near the shape."""
    shapes = [(h, min(width, tokens // h)) for h in range(1, min(height, tokens) + 1)]

    def loss(shape: tuple[int, int]) -> tuple[float, int]:
        """Least where number and shape are kept: five tokens in a line tell less than two lines of two."""
        tall, wide = shape
        bent = abs(math.log(tall * width / (wide * height)))
        return round(0.9 * bent + math.log(tokens / (tall * wide)), 6), wide

    return min(shapes, key=loss)


@dataclass(frozen=True)
class FastV(PruneTechnique):
    """Pruning once: behind layer `layer` stay the visual tokens that the prompt's last token looks at most.

    Of a prompt in chunks, each chunk's last token judges the chunk.

    Args:
        layer: K, layers that all tokens go through.
        ratio: kept fraction of the visual tokens, in (0, 1].

    Raises:
        ConfigError: a setting is out of range.

    Reference:
        FastV (arXiv 2403.06764) section 4; the paper's usual setting is layer 2 with half of the tokens. Its R is the
        removed fraction, 1 - `ratio`.
    """

    layer: int = 2
    ratio: float = 0.5

    def __post_init__(self) -> None:
        check_fraction("FastV.ratio", self.ratio)
        if not is_whole(self.layer, least=1):
            raise ConfigError(f"FastV.layer={self.layer!r}, wanted a number of layers, 1 or more")

    def check(self, spec: ModelSpec) -> None:
        check_layer("FastV.layer", self.layer, spec.num_layers)
        if self.layer - 1 in spec.sliding_layers:
            sees = f"layer {self.layer - 1} attends within a window of {spec.sliding_window}"
            raise ConfigError(
                f"FastV.layer={self.layer}: {sees}, so most tokens would go unseen; count to a full layer"
            )

    def prunes(self, layer_idx: int, num_layers: int) -> bool:
        return layer_idx == self.layer - 1 and self.ratio < 1

    def apply(
        self,
        q: Tensor,
        k: Tensor,
        is_visual: Tensor,
        origin: tuple[int, int],
        layer_idx: int,
        num_layers: int,
        query_index: Tensor | None,
        scale: float,
    ) -> Tensor:
        rows = is_visual.shape[0]
        is_visual = torch.cat([is_visual[:-1], is_visual.new_zeros(1)])  # the last token asks for the next one
        if q.shape[2] == 0:
            return torch.arange(rows, device=k.device)
        importance = self.importance(q, k, layer_idx, query_index, scale)[-rows:]
        return aim_keep(importance, is_visual, origin[0], self.ratio)

    def importance(self, q: Tensor, k: Tensor, layer_idx: int, query_index: Tensor | None, scale: float) -> Tensor:
        """[N] float32, of every key of one sequence: what the last query looks at; zero where there is no query."""
        if q.shape[2] == 0:
            return torch.zeros(k.shape[2], device=k.device)
        last = query_index[-1:] if query_index is not None else None
        return column_mass(q[:, :, -1:], k, query_index=last, scale=scale).mean(1)[0]

    def cost(self, spec: ModelSpec, lengths: Sequence[int]) -> int:
        """One product for the logits, and one of a vote with the probabilities, for pairs of queries that count."""
        return 2 * spec.num_attention_heads * (spec.head_dim + 1) * sum(lengths)

    def layer_cost(self, spec: ModelSpec, work: LayerWork) -> int:
        """The last query alone counts, if there is one."""
        return self.cost(spec, [work.keys]) if work.queries else 0


@dataclass(frozen=True)
class RandomPrune(AIMPrune):
    """AIM's schedule, but who leaves is drawn by lot.

    Args:
        seed: of the lot; every layer draws its own.
    """

    seed: int = 0

    def check(self, spec: ModelSpec) -> None:
        self.check_layers(spec)

    def importance(self, q: Tensor, k: Tensor, layer_idx: int, query_index: Tensor | None, scale: float) -> Tensor:
        return _lot((k.shape[2],), self.seed, layer_idx, k)

    def cost(self, spec: ModelSpec, lengths: Sequence[int]) -> int:
        return 0


@dataclass(frozen=True)
class RandomEvict(LookM):
    """LOOK-M's budget, but which entries stay is drawn by lot; nothing is merged unless asked.

    Args:
        seed: of the lot; every layer draws its own.
    """

    merge: str = "none"
    seed: int = 0

    def wants_mass(self, seen: int, layer_idx: int) -> bool:
        return False

    def score(self, q: Tensor, k: Tensor, layer_idx: int, query_index: Tensor | None, scale: float) -> Tensor:
        return _lot(k.shape[:3], self.seed, layer_idx, k)

    def accumulate(self, earlier: Tensor | None, now: Tensor) -> Tensor:
        """One lot for each entry: those of earlier passes keep theirs."""
        return now if earlier is None else earlier.where(earlier > 0, now)

    def cost(self, spec: ModelSpec, lengths: Sequence[int]) -> int:
        return 0


@dataclass(frozen=True)
class H2O(LookM):
    """Heavy hitters: entries that received most attention from all queries, and recent ones; the rest is dropped.

    Settings as `LookM`'s, without text first and without merging. The first four entries stay.

    Reference:
        H2O (arXiv 2306.14048), as LOOK-M (arXiv 2406.18139) compares itself with it.
    """

    merge: str = "none"
    text_prior: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.text_prior:
            raise ConfigError("H2O(text_prior=True) is LookM without merging: use LookM(merge='none')")


@dataclass(frozen=True)
class SnapKV(LookM):
    """What the last `window` queries look at, and these; scores are averaged over neighbours, the rest is dropped.

    Settings as `LookM`'s: the sum of the ratios, or the budget, is shared out between the window and the entries before
    it. In chunks, only the last window counts. The first four entries stay.

    Args:
        pool: how many neighbouring scores are averaged, an odd number.

    Reference:
        SnapKV (arXiv 2404.14469) section 4; window 32 and pooling 5 are its code's defaults. With grouped heads the
        scores of a group are summed; the first four entries are ours.
    """

    merge: str = "none"
    text_prior: bool = False
    queries: str = "last"
    window: int = 32
    pool: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_whole(self.pool, least=1) or self.pool % 2 == 0:
            raise ConfigError(f"SnapKV.pool={self.pool!r}, wanted an odd number of neighbours, 1 or more")
        if self.text_prior or self.queries != "last" or self.recent is not None:
            raise ConfigError(
                f"SnapKV(text_prior={self.text_prior}, queries={self.queries!r}, recent={self.recent}): its window "
                "alone counts and stays; leave these out, or use LookM"
            )

    def quota(self, seen: int, layer_idx: int) -> tuple[int, int]:
        important, recent = super().quota(seen, layer_idx)
        if important >= seen:
            return important, recent
        window = min(self.window, max(important + recent - SINKS, 0))
        return important + recent - window, window

    def score(self, q: Tensor, k: Tensor, layer_idx: int, query_index: Tensor | None, scale: float) -> Tensor:
        score = super().score(q, k, layer_idx, query_index, scale)
        before = max(score.shape[2] - self.window, 0)
        if before == 0:
            return score
        pooled = avg_pool1d(score[:, :, :before], self.pool, 1, self.pool // 2)
        return torch.cat([pooled, score[:, :, before:]], 2)

    def accumulate(self, earlier: Tensor | None, now: Tensor) -> Tensor:
        return now


def _lot(shape: tuple[int, ...], seed: int, layer_idx: int, like: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(1_000_003 * seed + layer_idx)
    return torch.rand(shape, generator=generator).to(like.device)
