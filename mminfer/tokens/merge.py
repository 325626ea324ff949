"""AIM, first half: merging similar visual tokens of one image before the language model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Self

import torch
from mminfer_kernels import best_match, gather_rows, merge_rows

from mminfer.errors import ConfigError, shown
from mminfer.layout import Modality, RowCounts, TokenLayout, places_of
from mminfer.technique import MERGE_SHARES, MergeTechnique, check_fraction

if TYPE_CHECKING:
    from mminfer.models.spec import ModelSpec


@dataclass(frozen=True)
class AIMMerge(MergeTechnique):
    """Merging of similar visual tokens inside each image or frame, before the language model.

    Rounds halve an image until no more than `ratio` of it is left. A merged token is the mean of its patches and stands
    where its destination stood, at that token's rotary position.

    Args:
        ratio: kept fraction of an image's tokens, in (0, 1]; at least one token stays.
        across_frames: whether tokens of a video may also merge with those of the neighbouring frame: the first with
            the second, the third with the fourth, and so on. Only of frames with nothing between them in the prompt;
            models that put text there merge within frames all the same.
        reference_order: the authors' order and mean: within an image what did not merge comes first, most similar
            first, then the destinations, and each round takes the plain mean. The tokens stand in that order in the
            places, and at the positions, that stay. Not on models whose positions have several axes, of which an order
            is no place.

    Raises:
        ConfigError: a setting is out of range, or the authors' order is asked for across frames, or of images with
            rows among their patches that are none.

    Reference:
        AIM (arXiv 2412.03248) section 3.2, which keeps 0.25 in two rounds; merging across frames is ours. The authors'
        code gives merged tokens an order of their own, which `reference_order` follows, forgets sizes between rounds,
        and closes the gaps that merged tokens leave in the positions, which we never do: text stands where it stood.
    """

    ratio: float = 0.25
    across_frames: bool = False
    reference_order: bool = False

    def __post_init__(self) -> None:
        check_fraction("AIMMerge.ratio", self.ratio)
        for name in ("across_frames", "reference_order"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"AIMMerge.{name}={shown(getattr(self, name))}, wanted True or False")
        if self.across_frames and self.reference_order:
            raise ConfigError(
                "AIMMerge(across_frames=True, reference_order=True): the authors never merge across frames, so their "
                "order is of one frame: leave one of the two at False"
            )

    def check(self, spec: ModelSpec) -> None:
        if self.reference_order and spec.position_axes > 1:
            raise ConfigError(
                f"AIMMerge.reference_order=True: positions of this {spec.family} model have {spec.position_axes} axes, "
                "on which a token keeps the place of its patch, and the authors' order has no place: leave it at False"
            )

    def apply(self, inputs_embeds: torch.Tensor, layout: TokenLayout) -> tuple[torch.Tensor, TokenLayout]:
        host = layout.on_host
        mergeable = (host.image_id >= 0) & (host.size > 0)
        if self.ratio == 1 or not bool(mergeable.any()):
            return inputs_embeds, layout
        device = layout.device
        stays, size = (~mergeable).to(device, non_blocking=True), layout.size.clone()
        owner = every = torch.arange(len(layout), device=device)
        merged = []  # rows and tokens of the images of one length
        gone = []  # as many rows of each image as leave, whichever these are
        for images in _images_by_length(mergeable, self._units(host)):  # [images, T]
            if self.reference_order:
                _check_for_their_order(images, layout)
            target, rows = max(1, round(images.shape[1] * self.ratio)), images.to(device, non_blocking=True)
            gone.append(images[:, target:].flatten())
            tokens, sizes = inputs_embeds[rows], layout.size[rows]
            while tokens.shape[1] > target:
                r = min(tokens.shape[1] // 2, tokens.shape[1] - target)
                place, tokens, sizes, joined = _merge_round(tokens, sizes, r, self.reference_order)
                step = every.index_put((rows,), rows.gather(1, joined))
                owner = step if owner is every else step[owner]
                rows = rows.gather(1, place)
            if self.reference_order:
                rows, owner = _in_their_order(rows, owner)
            size[rows] = sizes
            stays.index_fill_(0, rows.flatten(), True)
            merged.append((rows, tokens))
        left = torch.ones_like(mergeable).index_fill_(0, torch.cat(gone), False)
        index = places_of(stays, len(left) - sum(map(len, gone)))
        out, new_row = inputs_embeds[index], stays.cumsum(0) - 1
        for rows, tokens in merged:
            out[new_row[rows]] = tokens
        return out, replace(layout.merge(index, size[index], owner), counts=_counts_left(layout, left))

    def unit_lengths(self, layout: TokenLayout) -> tuple[int, ...]:
        host = layout.on_host
        mergeable = host.is_visual & (host.size > 0)
        return tuple(torch.bincount(self._units(host)[mergeable]).tolist())

    def _units(self, layout: TokenLayout) -> torch.Tensor:
        """[T] int64: what may merge with each other; -1 for text."""
        return _paired_frames(layout) if self.across_frames else layout.image_id

    def cost(self, spec: ModelSpec, lengths: Sequence[int]) -> int:
        """Cosine similarities, round by round."""
        total = 0
        for tokens in lengths:
            target = max(1, round(tokens * self.ratio))
            while tokens > target:
                total += 2 * spec.hidden_size * (tokens - tokens // 2) * (tokens // 2)
                tokens -= min(tokens // 2, tokens - target)
        return total

    def describe(self) -> str:
        where = "an image, or two neighbouring frames," if self.across_frames else "an image or frame"
        return f"Similar visual tokens of {where} are averaged until {100 * self.ratio:.0f} % of them are left."

    @classmethod
    def presets(cls) -> dict[str, Self]:
        return {"aim-merge": cls(ratio=0.25)}

    @classmethod
    def sweeps(cls) -> dict[str, dict[str, Self]]:
        return {"AIM merge": {f"{share} %": cls(share / 100) for share in MERGE_SHARES}}


def _counts_left(layout: TokenLayout, left: torch.Tensor) -> RowCounts | None:
    """What the host knows of the rows left, for a layout on a GPU.

    Args:
        layout: before merging.
        left: [T] bool, on the CPU: as many true values in each image as tokens of it are left.
    """
    known, own = layout.known, layout.on_host
    if known is None:
        return None
    lengths = tuple(torch.bincount(own.sequence[left], minlength=layout.num_sequences).tolist())
    visual = tuple(v - a + b for v, a, b in zip(known.visual_lengths, known.lengths, lengths, strict=True))
    return RowCounts(lengths, visual, known.ends_visual, own.is_visual[left] if _in_runs(own) else None)


def _in_runs(layout: TokenLayout) -> bool:
    """Whether the rows of each image follow each other, so that the places of text among rows left are known."""
    owner = layout.image_id[layout.is_visual]
    texts = (~layout.is_visual).cumsum(0)[layout.is_visual]  # rows of text before each visual one
    again = (owner[1:] == owner[:-1]) & (texts[1:] != texts[:-1])
    return not bool(again.any()) and len(owner.unique_consecutive()) == len(owner.unique())


def _in_their_order(rows: torch.Tensor, owner: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows ([images, K]) in which tokens stand that come in the authors' order, and who owns whom by these.

    Args:
        rows: of the tokens' destinations, in the tokens' order.
        owner: [T] int64, the destination that each row became part of.
    """
    slots = rows.sort(1).values
    moved = torch.arange(len(owner), device=rows.device)
    moved[rows] = slots
    return slots, moved[owner]


def _check_for_their_order(rows: torch.Tensor, layout: TokenLayout) -> None:
    """Raises `ConfigError` where other rows stand among images' patches ([images, T]), or companions go with them."""
    if layout.companions is not None or bool((rows.diff(dim=1) != 1).any()):
        raise ConfigError(
            "AIMMerge.reference_order=True: the images of this prompt have rows among their patches that are none, or "
            "features beside them, and the authors' order knows no place for these: leave it at False"
        )


def _paired_frames(layout: TokenLayout) -> torch.Tensor:
    """Image ids, but every second of the frames that stand next to each other takes the id of the one before."""
    frames, frame, counts = layout.image_id.unique_consecutive(return_inverse=True, return_counts=True)
    if len(frames) < 2:
        return layout.image_id
    starts = counts.cumsum(0) - counts
    is_video = layout.modality[starts] == Modality.VIDEO
    follows = is_video.clone()
    follows[0] = False
    follows[1:] &= is_video[:-1] & (layout.sequence[starts][1:] == layout.sequence[starts][:-1])
    order = torch.arange(len(frames), device=frames.device)
    place = order - order.masked_fill(follows, 0).cummax(0).values  # among frames without anything between them
    paired = torch.where(place % 2 == 1, frames.roll(1), frames)
    return paired[frame]


def _images_by_length(mergeable: torch.Tensor, image_id: torch.Tensor) -> list[torch.Tensor]:
    """Rows of the mergeable tokens, [images of one length, length] each: images of a length go together."""
    rows = mergeable.nonzero()[:, 0]
    _, counts = image_id[rows].unique_consecutive(return_counts=True)
    starts = counts.cumsum(0) - counts
    groups = []
    for length in counts.unique().tolist():
        first = starts[counts == length]
        groups.append(rows[first[:, None] + torch.arange(length, device=rows.device)])
    return groups


def aim_merge(x: torch.Tensor, r: int, reference_order: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge the `r` tokens of an image most similar to a neighbour into that neighbour: one round.

    Args:
        x: features of one image [T, C] or of a batch of images of one size [B, T, C].
        r: tokens to merge away, at most T // 2.
        reference_order: the authors' order of the result (unmerged sources, most similar first, then
            destinations) instead of the spatial order.

    Returns:
        tokens [T - r, C] or [B, T - r, C] in `x`'s dtype; sizes [T - r] or [B, T - r] float32, how many of
        `x`'s tokens each stands for.

    Raises:
        ConfigError: `r` is out of range.
        ValueError: `x` has the wrong number of dimensions.

    Reference:
        AIM (arXiv 2412.03248), token merging. Several rounds by the authors' rule are calls with
        `reference_order=True`: each takes the plain mean. `merge_round` carries sizes from round to round.
    """
    if x.dim() not in (2, 3):
        raise ValueError(f"x has shape {list(x.shape)}, wanted [T, C] or [B, T, C]")
    batch = x if x.dim() == 3 else x[None]
    ones = torch.ones(batch.shape[:2], dtype=torch.float32, device=x.device)
    _, tokens, sizes = merge_round(batch, ones, r, reference_order)
    return (tokens, sizes) if x.dim() == 3 else (tokens[0], sizes[0])


def merge_round(
    x: torch.Tensor, sizes: torch.Tensor, r: int, reference_order: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One round of merging over images of one size, with the sizes tokens already have.

    Tokens at even places are sources, at odd places destinations; the `r` sources most similar to a
    destination are averaged into it, weighted by how many tokens each stands for. A merged token stands where
    its destination stood.

    Args:
        x: features [B, T, C]; tokens of different images never merge.
        sizes: [B, T], how many original tokens each token stands for.
        r: tokens to merge away, at most T // 2.
        reference_order: the authors' order of the result, and their plain mean.

    Returns:
        place [B, T - r] int64: the place in `x` at which each result stands, ascending unless
        `reference_order`, to select positions by; tokens [B, T - r, C] in `x`'s dtype; sizes [B, T - r] in
        `sizes`' dtype.

    Raises:
        ConfigError: `r` is out of range.
        ValueError: shapes that do not fit.

    Reference:
        AIM (arXiv 2412.03248), token merging, after ToMe (arXiv 2210.09461). The authors' mean forgets sizes
        between rounds and their order is not spatial.
    """
    return _merge_round(x, sizes, r, reference_order)[:3]


def _merge_round(
    x: torch.Tensor, sizes: torch.Tensor, r: int, reference_order: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`merge_round`, and [B, T] int64: the place in `x` of the token that each token became part of."""
    if x.dim() != 3 or sizes.shape != x.shape[:2]:
        raise ValueError(f"x is {list(x.shape)} and sizes {list(sizes.shape)}, wanted [B, T, C] and [B, T]")
    tokens = x.shape[1]
    if not 0 <= r <= tokens // 2:
        raise ConfigError(f"r is {r}, wanted 0 to {tokens // 2}: at most half of {tokens} tokens merge in a round")
    place = torch.arange(tokens, device=x.device).expand(x.shape[0], tokens)
    if r == 0:
        return place.clone(), x.clone(), sizes.clone(), place
    source, destination = x[:, ::2], x[:, 1::2]
    similarity, match = best_match(source, destination)
    order = similarity.argsort(dim=-1, descending=True, stable=True)
    merged, unmerged = order[:, :r], order[:, r:]  # places among the sources
    places, ranked = 2 * order, sizes[:, ::2].gather(1, order)
    size = ranked[:, :r]
    rows, target = gather_rows(source, merged), match.gather(1, merged)
    weights = (None, None) if reference_order else (sizes[:, 1::2], size)
    destination, _ = merge_rows(destination, rows, target, *weights)
    grown = sizes[:, 1::2].scatter_add(1, target, size)
    owner = place.scatter(1, places[:, :r], 2 * target + 1)
    place = torch.cat((places[:, r:], place[:, 1::2]), 1)
    result = torch.cat((gather_rows(source, unmerged), destination), 1)
    sizes = torch.cat((ranked[:, r:], grown), 1)
    if reference_order:
        return place, result, sizes, owner
    place, spatial = place.sort(1)
    return place, gather_rows(result, spatial), sizes.gather(1, spatial), owner
