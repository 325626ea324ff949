"""Regions: the rule by hand on small grids, areas that collapse and text that stays, every family at both doors."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from mminfer_kernels import grow_regions
from mminfer_kernels.regions.reference import Bounds, _Joins
from torch.nn.functional import normalize

from mminfer import ConfigError, InferenceConfig, OperatorSkip, RegionMerge
from mminfer.layout import Modality, TokenLayout
from mminfer.models.registry import adapter_for
from mminfer.tokens.grid import grid_of
from tests.doors import same_by_both_doors
from tests.tiny import FAMILIES, IMAGE, MARKED_FAMILIES, VIDEO, fitting, tiny_inputs, tiny_model

CHANNELS = 12
CLOSE = 1e-4  # what float32 may order otherwise


def pictures(*sequences, modality=Modality.IMAGE):
    """A layout of pictures (lines, columns) with M-RoPE's axes, text in front of and behind those of a sequence."""
    rows, image = [], 0
    for sequence, grids in enumerate(sequences):
        rows.append((sequence, 0, -1, 0, 0))
        for height, width in grids:
            rows += [(sequence, int(modality), image, y, x) for y in range(height) for x in range(width)]
            image += 1
        rows.append((sequence, 0, -1, 0, 0))
    sequence, kind, image_id, y, x = torch.tensor(rows).T
    return TokenLayout(
        sequence=sequence,
        modality=kind.to(torch.int8),
        image_id=image_id,
        size=torch.ones(len(rows)),
        source=torch.arange(len(rows)),
        position=torch.stack([0 * y, y, x]).double(),
        next_position=torch.zeros(len(sequences), dtype=torch.float64),
    )


def drawn(count, seed=0, channels=CHANNELS):
    return torch.randn(count, channels, generator=torch.Generator().manual_seed(seed))


def smooth(layout, seed=0):
    """Features that change slowly over each picture, so that regions of several sizes grow."""
    y, x = layout.position[1:].float()
    waves = drawn(4, seed)
    angle = layout.image_id[:, None] + torch.stack([y, x, y + x, y * 0 + 1], 1) * 0.2
    return torch.sin(angle) @ waves + 0.02 * drawn(len(layout), seed + 1)


def told_apart(values):
    """Whether float32 orders these numbers as float64 does."""
    return all(b - a > CLOSE for a, b in pairwise(sorted(values)))


class Slow:
    """The rule of `grow_regions`, region by region."""

    def __init__(self, x, sizes, bounds):
        units = normalize(x.double(), dim=-1)
        self.cosines, self.sizes, self.bounds = (units @ units.T).tolist(), sizes.tolist(), bounds
        self.members = {n: [n] for n in range(len(x))}
        self.height = dict.fromkeys(self.members, 0.0)
        self.joins = []  # height, into, gone

    def size(self, members):
        return sum(self.sizes[m] for m in members)

    def scatter(self, members):
        """Squared distances from the mean, by size."""
        total = sum(self.sizes[a] * self.sizes[b] * self.cosines[a][b] for a in members for b in members)
        return self.size(members) - total / self.size(members)

    def alike(self, members):
        pairs = [(a, b, self.sizes[a] * self.sizes[b]) for a in members for b in members if a != b]
        return sum(w * self.cosines[a][b] for a, b, w in pairs) / sum(w for _, _, w in pairs)

    def group(self, region):
        return 0 if self.bounds.group is None else int(self.bounds.group[region])

    def limit(self, group):
        """What the dearest join costs that stands."""
        if self.bounds.spare is None:
            return math.inf
        spare, heights = int(self.bounds.spare[group]), sorted(h for h, a, _ in self.joins if self.group(a) == group)
        return -math.inf if spare < 1 else heights[spare - 1] if len(heights) >= spare else math.inf

    def may(self, a, b, cost):
        both = self.members[a] + self.members[b]
        if self.bounds.largest is not None and self.size(both) > self.bounds.largest:
            return False
        if max(cost, self.height[a], self.height[b]) > self.limit(self.group(a)):
            return False
        return self.bounds.threshold is None or self.alike(both) >= self.bounds.threshold

    def round(self, edges):
        """The edges that are left behind a round."""
        cost = {(a, b): self.scatter(self.members[a] + self.members[b]) for a, b in edges}
        cost = {e: c - self.scatter(self.members[e[0]]) - self.scatter(self.members[e[1]]) for e, c in cost.items()}
        if self.bounds.threshold is not None:
            likes = (self.alike(self.members[a] + self.members[b]) for a, b in edges)
            assume(all(abs(alike - self.bounds.threshold) > CLOSE for alike in likes))
        assume(told_apart(cost.values()))
        cost = {(a, b): c for (a, b), c in cost.items() if self.may(a, b, c)}
        best = {}
        for edge in sorted(cost, key=cost.__getitem__, reverse=True):
            best[edge[0]] = best[edge[1]] = edge
        label = {n: n for n in self.members}
        for a, b in [edge for edge in cost if best[edge[0]] == best[edge[1]] == edge]:
            self.height[a] = max(cost[a, b], self.height[a], self.height[b])
            self.joins.append((self.height[a], a, b))
            self.members[a] += self.members.pop(b)
            label[b] = a
        renamed = {tuple(sorted((label[a], label[b]))) for a, b in cost}
        return {edge for edge in renamed if edge[0] != edge[1]}

    def owners(self, pairs):
        edges = {tuple(sorted(pair)) for pair in pairs.T.tolist()}
        while edges:
            edges = self.round(edges)
        owner, stands = list(range(len(self.sizes))), []
        for group in {self.group(a) for _, a, _ in self.joins}:
            own = sorted((join for join in self.joins if self.group(join[1]) == group), key=lambda join: join[0])
            spare = len(own) if self.bounds.spare is None else max(0, int(self.bounds.spare[group]))
            assume(spare >= len(own) or spare < 1 or own[spare][0] - own[spare - 1][0] > CLOSE)
            stands += own[:spare]
        for _, a, b in sorted(stands, key=lambda join: -join[2]):  # of a later one the owner is not known yet
            owner[b] = a
        return [self.root(owner, n) for n in range(len(owner))]

    @staticmethod
    def root(owner, n):
        while owner[n] != n:
            n = owner[n]
        return n


@settings(deadline=None, max_examples=25)
@given(
    grids=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 5)), min_size=1, max_size=3),
    threshold=st.sampled_from([None, -0.3, 0.0, 0.4]),
    largest=st.sampled_from([None, 2, 3, 4, 7]),
    ratio=st.sampled_from([None, 0.05, 0.3, 0.6, 0.9]),
    weighted=st.booleans(),
    seed=st.integers(0, 9999),
)
def test_regions_are_what_the_rule_says(grids, threshold, largest, ratio, weighted, seed):
    grid = grid_of(pictures(*([shape] for shape in grids)))
    count = len(grid.rows)
    x = drawn(count, seed, 4)
    sizes = 1.0 + (torch.arange(count) * 7 % 3 if weighted else torch.zeros(count))
    pairs = torch.cat([torch.stack([(o >= 0).nonzero()[:, 0], o[o >= 0]]) for o in grid.beside()], 1)
    bounds = Bounds(threshold, largest)
    if ratio is not None:
        counts = grid.view.bincount()
        bounds = Bounds(threshold, largest, grid.view, counts - (counts * ratio).round().long())
    wanted = Slow(x, sizes, bounds).owners(pairs)
    for backend in ("reference", "auto"):
        found = grow_regions(x, sizes, pairs, threshold, largest, bounds.group, bounds.spare, backend=backend)
        assert found.tolist() == wanted, backend


def test_a_join_does_not_stand_without_those_that_led_to_it():
    """However cheap it is."""
    joins = _Joins(3, Bounds(group=torch.zeros(3, dtype=torch.int64), spare=torch.tensor([1])), torch.device("cpu"))
    joins.note(torch.tensor([[0], [1]]), torch.tensor([5.0]))
    joins.note(torch.tensor([[0], [2]]), torch.tensor([1.0]))
    assert joins.owners().tolist() == [0, 0, 2]


def page():
    """A page of 8 x 8: blank but for two equal words below each other, two equal digits beside each other, and text."""
    layout = pictures([(8, 8)])
    look = torch.zeros(8, 8, dtype=torch.int64)  # 0: blank
    look[4:, :] = torch.arange(10, 42).view(4, 8)
    look[4, 2] = look[5, 2] = 1
    look[6, 5] = look[6, 6] = 2
    pixels = torch.eye(64)[look.flatten()]
    return layout, torch.cat([drawn(1, 1, 64), pixels, drawn(1, 2, 64)]), look


def test_areas_collapse_and_text_stays():
    layout, x, look = page()
    out, left = RegionMerge().apply(x, layout)
    text = (look.flatten() != 0).nonzero()[:, 0] + 1
    stays = left.size == 1
    assert set(text.tolist()) <= set(left.source[stays].tolist())
    assert left.size[~stays].tolist() == [4.0] * 8 and torch.equal(out[~stays], x[1:9])  # blanks alone
    assert torch.equal(out[stays], x[left.source[stays]])
    # a chain of equal tokens is no area, however long it is
    for shape in ((1, 9), (9, 1)):
        line = pictures([shape])
        assert RegionMerge().apply(torch.ones(11, 3), line)[1].source.tolist() == list(range(11))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_tokens_join_into_blocks(dtype):
    """By the strictest threshold, which rounding does not cross; blocks of two by two, told alike wherever they are."""
    layout = pictures([(6, 8), (4, 4)], [(6, 8)])
    x = drawn(1, 3, 100).to(dtype).expand(len(layout), 100)
    out, left = RegionMerge(threshold=1.0).apply(x, layout)
    assert left.size[left.is_visual].tolist() == [4.0] * (12 + 4 + 12)
    y, x = layout.position[1:, left.source][:, left.is_visual]
    assert (y % 2 == 0).all() and (x % 2 == 0).all()  # the first of four that are as far from the centre
    assert out.dtype == dtype


def members(merge, x, layout):
    """The patches of each region: numbers among the patches."""
    region = merge._regions(x, grid_of(layout), layout)
    return [(region == n).nonzero()[:, 0] for n in region.unique().tolist()]


@pytest.mark.parametrize("threshold", [0.8, 0.9, 0.97])
@pytest.mark.parametrize("largest", [2, 4, 9, None])
def test_a_region_is_in_one_piece_alike_and_no_larger(threshold, largest):
    layout = pictures([(9, 7), (6, 6)], [(5, 8)])
    x, grid = smooth(layout), grid_of(layout)
    found = members(RegionMerge(threshold, largest), x, layout)
    units = normalize(x[grid.rows].double(), dim=-1)
    assert sum(len(own) > 1 for own in found) > 0
    for own in found:
        cosines = units[own] @ units[own].T
        assert len(own) == 1 or (cosines.sum() - len(own)) / (len(own) ** 2 - len(own)) >= threshold - 2e-5
        assert largest is None or len(own) <= largest
        assert len(grid.view[own].unique()) == 1
        reached = {int(own[0])}  # within the region, from neighbour to neighbour
        for _ in own:
            for steps in grid.beside():
                links = [(n, int(steps[n])) for n in own.tolist() if int(steps[n]) in own.tolist()]
                reached |= {b for a, b in links if a in reached} | {a for a, b in links if b in reached}
        assert len(reached) == len(own)


@pytest.mark.parametrize("threshold", [None, 0.9])
def test_a_merged_token_is_the_mean_of_its_patches_and_stands_at_their_middle(threshold):
    layout = pictures([(9, 7)], [(4, 4)])
    x, grid, merge = smooth(layout), grid_of(layout), RegionMerge(threshold, None, 0.4)
    out, left = merge.apply(x, layout)
    patches = left.is_visual.nonzero()[:, 0]
    place = torch.stack([grid.y, grid.x], 1).double()
    owner = {}
    for own in members(merge, x, layout):
        far = (place[own] - place[own].mean(0)).square().sum(1)
        owner[int(grid.rows[own[(far <= far.min() + 1e-9).nonzero()[0, 0]]])] = own
    assert sorted(owner) == left.source[patches].tolist()
    for row, source in zip(patches.tolist(), left.source[patches].tolist(), strict=True):
        torch.testing.assert_close(out[row], x[grid.rows[owner[source]]].mean(0), rtol=0, atol=1e-5)
        assert left.size[row] == len(owner[source])
    assert torch.equal(left.position, layout.position[:, left.source])


@pytest.mark.parametrize("ratio", [0.02, 0.1, 0.33, 0.5, 0.9, 1.0])
def test_a_share_is_met_in_each_sequence(ratio):
    layout = pictures([(9, 7), (6, 6)], [], [(5, 8)], [(1, 1)])
    _, left = RegionMerge(None, None, ratio).apply(drawn(len(layout)), layout)
    fewest = [2, 0, 1, 1]  # a token of each picture stays
    wanted = [max(few, round(n * ratio)) for few, n in zip(fewest, layout.visual_lengths, strict=True)]
    assert list(left.visual_lengths) == wanted
    # as a bound of areas: no less, and no less than what they come to without it
    blank = torch.ones(len(layout), 3)
    bounded = RegionMerge(0.99, 4, ratio).apply(blank, layout)[1].visual_lengths
    free = RegionMerge(0.99, 4).apply(blank, layout)[1].visual_lengths
    assert list(bounded) == [max(a, round(n * ratio)) for a, n in zip(free, layout.visual_lengths, strict=True)]


MERGES = [RegionMerge(0.9), RegionMerge(None, None, 0.3), RegionMerge(0.8, None, 0.5, across_frames=True)]


@pytest.mark.parametrize("merge", MERGES, ids=["areas", "share", "both"])
@pytest.mark.parametrize("order", [[0, 1, 2], [2, 0, 1]])
def test_a_batch_is_its_sequences_alone(merge, order):
    shapes = [[(9, 7), (6, 6)], [], [(5, 8)]]
    alone, joined = [], []
    for n in order:
        layout = pictures(shapes[n])
        x = smooth(layout, n)
        joined.append(x)
        alone.append(merge.apply(x, layout))
    out, left = merge.apply(torch.cat(joined), pictures(*(shapes[n] for n in order)))
    assert list(left.lengths) == [len(own) for own, _ in alone]
    assert torch.equal(out, torch.cat([own for own, _ in alone]))
    assert torch.equal(left.size, torch.cat([own.size for _, own in alone]))


def test_a_prompt_without_anything_to_join_is_given_back():
    for layout in (pictures([], []), pictures([(1, 1)])):
        x = torch.ones(len(layout), 3)
        for merge in MERGES:
            out, left = merge.apply(x, layout)
            assert torch.equal(out, x) and left.source.tolist() == list(range(len(layout)))
    layout = pictures([(3, 3)])
    x = torch.zeros(len(layout), 3)  # nothing is alike where nothing is
    assert RegionMerge().apply(x, layout)[1].source.tolist() == list(range(11))
    assert RegionMerge(None, None, 0.3).apply(x, layout)[1].visual_lengths == (3,)
    assert RegionMerge(ratio=1).apply(x, layout)[0] is x


def test_equal_frames_join_over_time():
    layout = pictures([(3, 4), (3, 4)], [(3, 4)], modality=Modality.VIDEO)
    frame = torch.eye(12)
    x = torch.cat([torch.zeros(1, 12), frame, frame, torch.zeros(2, 12), frame, torch.zeros(1, 12)])
    out, left = RegionMerge(across_frames=True).apply(x, layout)
    assert left.visual_lengths == (12, 12) and left.size[left.is_visual].tolist() == [2.0] * 12 + [1.0] * 12
    assert torch.equal(out[left.is_visual], frame.repeat(2, 1)) and left.image_id[left.is_visual].max() == 2
    assert RegionMerge().apply(x, layout)[1].visual_lengths == (24, 12)
    images = pictures([(3, 4), (3, 4)], [(3, 4)])
    assert RegionMerge(across_frames=True).apply(x, images)[1].visual_lengths == (24, 12)


@pytest.mark.parametrize("merge", [RegionMerge(0.0, None, 0.3), RegionMerge(None, 5, 0.2, True)], ids=["alike", "any"])
@pytest.mark.parametrize("family", FAMILIES)
def test_patches_are_conserved_and_nothing_else_is_touched(family, merge):
    prompts = [[3, IMAGE, 5, IMAGE, 4], [7], [2, VIDEO if FAMILIES[family].video else IMAGE]]
    with torch.no_grad():
        embeds, layout = adapter_for(tiny_model(family)).embed(tiny_inputs(family, prompts))
    out, left = merge.apply(embeds, layout)
    assert len(left) < len(layout) and (left.source.diff() > 0).all()
    fixed = (layout.image_id < 0) | (layout.size == 0)  # text and newlines
    stays = fixed[left.source]
    assert torch.equal(left.source[stays], fixed.nonzero()[:, 0])
    assert torch.equal(out[stays], embeds[fixed]) and torch.equal(left.size[stays], layout.size[fixed])
    units = layout.image_id if not merge.across_frames else layout.sequence
    for unit in units[~fixed].unique().tolist():
        before = layout.size * (units == unit) * ~fixed
        after = left.size * (units[left.source] == unit) * ~stays
        assert before.sum() == after.sum()
        torch.testing.assert_close(before @ embeds, after @ out, rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", MARKED_FAMILIES)
def test_both_doors_give_the_same(family):
    config = fitting(family, InferenceConfig(merge=RegionMerge(None, 6, 0.4), skip=OperatorSkip(ffn=[0])))
    model, inputs = tiny_model(family), tiny_inputs(family, [[3, IMAGE, 9], [6]])
    outputs = same_by_both_doors(model, inputs, config, 3)
    assert outputs[0].stats.merged_tokens < outputs[0].stats.prompt_tokens


WRONG = {
    "threshold": [-0.1, 1.01, math.nan, math.inf, "0.9", True],
    "largest": [0, 1, -4, 2.5, "4", True],
    "ratio": [0, -0.1, 1.2, math.nan, "0.5", True],
    "across_frames": [1, 0, None, "yes"],
}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in WRONG.items() for value in values])
def test_settings_out_of_range_are_refused(field, value):
    with pytest.raises(ConfigError, match=rf"RegionMerge.{field}="):
        RegionMerge(**{field: value})


def test_something_must_be_asked_for():
    with pytest.raises(ConfigError, match="neither threshold nor ratio"):
        RegionMerge(threshold=None)
    with pytest.raises(ConfigError, match="neither threshold nor ratio"):
        InferenceConfig.from_dict({"merge": {"technique": "RegionMerge", "threshold": None}})
