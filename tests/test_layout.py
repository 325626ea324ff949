"""The token record: narrowing keeps order and facts, merging moves patches and loses none."""

import dataclasses
import itertools
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mminfer.layout import Modality, TokenLayout
from mminfer.tokens.merge import AIMMerge

TEXT = "text"
CHANNELS = 8
FIELDS = [field.name for field in dataclasses.fields(TokenLayout)]


def make_layout(prompts, axes=1, seed=0):
    """A layout of prompts: an int is so many text tokens, a string an image of patches "o" and newlines "n".

    Image ids are dealt in any order, as those of a prompt with videos before images are.
    """
    images = sum(isinstance(part, str) for prompt in prompts for part in prompt)
    ids = random.Random(seed).sample(range(images), images)
    rows = []  # (sequence, modality, image id, size)
    for sequence, prompt in enumerate(prompts):
        for part in prompt:
            if isinstance(part, int):
                rows += [(sequence, Modality.TEXT, -1, 1)] * part
            else:
                image, modality = ids.pop(), Modality.VIDEO if len(ids) % 2 else Modality.IMAGE
                rows += [(sequence, modality, image, int(mark == "o")) for mark in part]
    sequence, modality, image_id, size = (torch.tensor([row[i] for row in rows]) for i in range(4))
    generator = torch.Generator().manual_seed(seed)
    return TokenLayout(
        sequence=sequence,
        modality=modality.to(torch.int8),
        image_id=image_id,
        size=size.float(),
        source=torch.arange(len(rows)),
        position=torch.rand(axes, len(rows), generator=generator, dtype=torch.float64),
        next_position=torch.arange(len(prompts), dtype=torch.float64),
    )


MIXED = [[2, "oooon", "oo", 1], [3], ["on", 1, "ooo"]]


def test_what_a_layout_says():
    layout = make_layout(MIXED, axes=3)
    assert len(layout) == 10 + 3 + 6
    assert layout.num_sequences == 3
    assert layout.lengths == (10, 3, 6)
    assert layout.spans == ((0, 10), (10, 13), (13, 19))
    assert layout.visual_lengths == (7, 0, 5)
    assert layout.text_rows.tolist() == [0, 1, 9, 10, 11, 12, 15]
    assert sorted(layout.image_lengths) == [1, 2, 3, 4]  # newlines stand for no patch
    order = layout.image_id[[2, 7, 13, 16]].tolist()
    assert [layout.image_lengths[i] for i in order] == [4, 2, 1, 3]


def test_a_sequence_that_lost_every_row_has_an_empty_span():
    layout = make_layout([[2], ["ooo"], [1]])
    left = layout.select(layout.text_rows)
    assert left.lengths == (2, 0, 1)
    assert left.spans == ((0, 2), (2, 2), (2, 3))
    assert left.visual_lengths == (0, 0, 0) and left.image_lengths == ()


def test_text_alone():
    layout = make_layout([[4], [1]])
    assert layout.visual_lengths == (0, 0) and layout.image_lengths == ()
    assert layout.text_rows.tolist() == [0, 1, 2, 3, 4]


def test_a_layout_is_frozen_and_what_comes_of_it_is_new():
    layout = make_layout(MIXED)
    before = {name: getattr(layout, name).clone() for name in FIELDS if getattr(layout, name) is not None}
    for name in FIELDS:
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(layout, name, getattr(layout, name))
    assert layout.lengths == (10, 3, 6)  # computed once, and not taken along
    narrowed = layout.select(torch.tensor([0, 2, 12]))
    assert narrowed.lengths == (2, 1, 0) and layout.lengths == (10, 3, 6)
    moved = layout.at(layout.position + 1, layout.next_position + 1)
    assert moved.lengths == layout.lengths and torch.equal(moved.source, layout.source)
    layout.merge(torch.tensor([2]), torch.tensor([4.0]), torch.arange(len(layout)))
    AIMMerge(0.25).apply(torch.randn(len(layout), CHANNELS), layout)
    for name, value in before.items():
        assert torch.equal(getattr(layout, name), value), name


def test_layouts_compare_by_identity():
    """An equality over tensors would have no truth value."""
    layout = make_layout(MIXED)
    assert layout == layout
    assert (layout == make_layout(MIXED)) is False


# An image: patches with newlines between and behind, at least one patch.
images = st.tuples(st.text("oooon", min_size=0, max_size=20), st.sampled_from(["", "n"])).map(
    lambda parts: "o" + parts[0] + parts[1]
)
prompt = st.lists(st.one_of(st.integers(1, 4), images), min_size=1, max_size=5)
batches = st.lists(prompt, min_size=1, max_size=4)


@settings(deadline=None, max_examples=50)
@given(prompts=batches, axes=st.sampled_from([1, 3]), seed=st.integers(0, 999), data=st.data())
def test_selecting_keeps_order_and_facts(prompts, axes, seed, data):
    layout = make_layout(prompts, axes, seed)
    chosen = data.draw(st.lists(st.integers(0, len(layout) - 1), unique=True).map(sorted))
    index = torch.tensor(chosen, dtype=torch.int64)
    left = layout.select(index)
    assert len(left) == len(chosen) and left.source.tolist() == chosen
    for name in ("sequence", "modality", "image_id", "size"):
        assert torch.equal(getattr(left, name), getattr(layout, name)[index])
    assert torch.equal(left.position, layout.position[:, index])
    assert torch.equal(left.next_position, layout.next_position)
    assert left.num_sequences == len(prompts) and sum(left.lengths) == len(chosen)
    spans = left.spans
    for number, (start, stop) in enumerate(spans):
        assert (left.sequence[start:stop] == number).all()
    assert spans[0][0] == 0 and spans[-1][1] == len(chosen)
    assert all(a[1] == b[0] for a, b in itertools.pairwise(spans))
    again = layout.select(index).select(torch.arange(len(chosen))[::2])
    assert again.source.tolist() == chosen[::2]


def rows_of(layout):
    """Rows of each image's patches, by image id."""
    patches = (layout.image_id >= 0) & (layout.size > 0)
    ids = layout.image_id[patches].unique().tolist()
    return {i: (patches & (layout.image_id == i)).nonzero()[:, 0] for i in ids}


@settings(deadline=None, max_examples=60)
@given(
    prompts=batches,
    axes=st.sampled_from([1, 3]),
    seed=st.integers(0, 999),
    ratio=st.one_of(st.sampled_from([0.01, 0.25, 1 / 3, 0.5, 0.75, 1.0]), st.floats(0.01, 1)),
)
def test_merging_conserves_patches_and_touches_nothing_else(prompts, axes, seed, ratio):
    layout = make_layout(prompts, axes, seed)
    x = torch.randn(len(layout), CHANNELS, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    before = x.clone()
    out, left = AIMMerge(ratio).apply(x, layout)
    assert torch.equal(x, before)
    assert out.shape == (len(left), CHANNELS) and (left.source.diff() > 0).all()
    # text and newlines are there, bit for bit, sizes included
    fixed = (layout.image_id < 0) | (layout.size == 0)
    stays = fixed[left.source]
    assert torch.equal(left.source[stays], fixed.nonzero()[:, 0])
    assert torch.equal(out[stays], x[fixed]) and torch.equal(left.size[stays], layout.size[fixed])
    # what stays keeps its place in the prompt
    for name in ("sequence", "modality", "image_id"):
        assert torch.equal(getattr(left, name), getattr(layout, name)[left.source])
    assert torch.equal(left.position, layout.position[:, left.source])
    assert torch.equal(left.next_position, layout.next_position)
    # each image keeps its share of tokens, all its patches and their sum
    found, given_rows = rows_of(left), rows_of(layout)
    assert found.keys() == given_rows.keys()
    for image, rows in given_rows.items():
        merged = found[image]
        assert len(merged) == max(1, round(len(rows) * ratio))
        assert left.size[merged].sum() == len(rows) and (left.size[merged] >= 1).all()
        total = (left.size[merged, None] * out[merged]).sum(0)
        torch.testing.assert_close(total, x[rows].sum(0), rtol=1e-9, atol=1e-9)
        # and is what it would be alone
        alone, alone_left = AIMMerge(ratio).apply(x[rows], layout.select(rows))
        torch.testing.assert_close(out[merged], alone, rtol=1e-9, atol=1e-9)
        assert torch.equal(left.source[merged], alone_left.source)
        assert torch.equal(left.size[merged], alone_left.size)


@settings(deadline=None, max_examples=30)
@given(prompts=batches, seed=st.integers(0, 999))
def test_a_ratio_of_one_gives_back_what_came_in(prompts, seed):
    layout, x = make_layout(prompts, seed=seed), torch.randn(sum(make_layout(prompts).lengths), CHANNELS)
    out, left = AIMMerge(1).apply(x, layout)
    assert out is x and left is layout


def test_merging_leaves_text_alone():
    layout, x = make_layout([[3], [2]]), torch.randn(5, CHANNELS)
    out, left = AIMMerge(0.25).apply(x, layout)
    assert torch.equal(out, x) and torch.equal(left.source, layout.source)


def test_merging_stays_inside_an_image():
    """Two images of the same tokens, side by side: each token's twin is in the other image."""
    x = torch.nn.functional.one_hot(torch.arange(8), CHANNELS).double().repeat(2, 1)
    layout = make_layout([["o" * 8, "o" * 8]])
    out, left = AIMMerge(0.5).apply(x, layout)
    first = left.source < 8
    assert left.size[first].sum() == left.size[~first].sum() == 8
    assert torch.equal(out[first], out[~first])
    assert (out.max(1).values <= 1 / left.size + 1e-12).all()  # a merge of twins would have kept its one


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_merging_keeps_the_dtype(dtype):
    layout = make_layout(MIXED)
    x = torch.randn(len(layout), CHANNELS).to(dtype)
    out, left = AIMMerge(0.5).apply(x, layout)
    assert out.dtype == dtype and left.size.dtype == torch.float32
    assert torch.equal(out[~left.is_visual], x[layout.text_rows])


def video_layout(frames, gap_after, sequence_after=10**9):
    """Frames of 6 tokens of one video each behind the other, text behind those in `gap_after`, text at both ends."""
    modality, image_id, sequence = [0, 0], [-1, -1], [0, 0]
    for frame in range(frames):
        row = int(frame >= sequence_after)
        modality += [2] * 6
        image_id += [frame] * 6
        sequence += [row] * 6
        if frame in gap_after:
            modality, image_id, sequence = [*modality, 0], [*image_id, -1], [*sequence, row]
    tokens = len(modality)
    ids, rows = torch.tensor(image_id), torch.tensor(sequence)
    ones, places = torch.ones(tokens), torch.arange(tokens)
    where = torch.zeros(int(rows.max()) + 1, dtype=torch.float64)
    return TokenLayout(rows, torch.tensor(modality).to(torch.int8), ids, ones, places, places.double()[None], where)


@pytest.mark.parametrize(
    ("layout", "lengths"),
    [
        (video_layout(4, []), [12, 12]),
        (video_layout(5, []), [12, 12, 6]),
        (video_layout(5, [0]), [6, 12, 12]),
        (video_layout(4, [0, 1, 2]), [6, 6, 6, 6]),
        (video_layout(4, [], sequence_after=1), [6, 12, 6]),
    ],
)
def test_merging_across_frames_takes_neighbours_in_pairs(layout, lengths):
    merge = AIMMerge(0.5, across_frames=True)
    assert [n for n in merge.unit_lengths(layout) if n] == lengths
    assert set(AIMMerge(0.5).unit_lengths(layout)) == {6}
    x = torch.randn(len(layout), CHANNELS)
    tokens, left = merge.apply(x, layout)
    assert len(left) == int((~layout.is_visual).sum()) + sum(n // 2 for n in lengths)
    assert left.size.sum() == layout.size.sum() and (left.source.diff() > 0).all()
    assert torch.equal(tokens[left.text_rows], x[layout.text_rows])


def test_equal_frames_merge_into_one():
    """Every token of the second frame is a token of the first: half of them keeps all there is to see."""
    layout = video_layout(2, [])
    frame = torch.eye(6, CHANNELS)
    x = torch.cat([torch.zeros(2, CHANNELS), frame, frame.roll(1, 0)])
    tokens, _ = AIMMerge(0.5, across_frames=True).apply(x, layout)
    assert torch.equal(tokens[2:].unique(dim=0), frame.unique(dim=0))
    within, _ = AIMMerge(0.5).apply(x, layout)
    assert not torch.equal(within[2:].unique(dim=0), frame.unique(dim=0))
