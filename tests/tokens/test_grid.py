"""Where an image's tokens stand: by M-RoPE's axes, by marks between lines, as a square, or in one line."""

import pytest
import torch

from mminfer import V2PE
from mminfer.layout import Modality, TokenLayout
from mminfer.models.registry import adapter_for
from mminfer.tokens.grid import grid_of
from tests.tiny import FAMILIES, IMAGE, VIDEO, tiny_inputs, tiny_model

GRIDS = {  # of the first image or tile: lines, tokens a line
    "internvl": (4, 4), "llava": (4, 4), "mistral3": (4, 4), "idefics3": (4, 4), "smolvlm": (4, 4), "gemma3": (4, 4),
    "qwen2_vl": (4, 6), "qwen2_5_vl": (4, 6), "qwen3_vl": (4, 6), "llava_next": (4, 4), "llava_onevision": (4, 4),
}  # fmt: skip


@pytest.mark.parametrize("delta", [1, 1 / 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_token_has_a_place_of_its_own(family, delta):
    """Also where positions stand closer than one apart."""
    adapter = adapter_for(tiny_model(family))
    with torch.no_grad():
        _, layout = adapter.embed(tiny_inputs(family, [[3, IMAGE, 5, IMAGE, 4]]))
    layout = V2PE(delta).apply(layout, 4096)
    patches = ((layout.image_id >= 0) & (layout.size > 0)).nonzero()[:, 0]
    grid = grid_of(layout)
    assert torch.equal(grid.rows, patches)
    for n, (height, width) in enumerate(zip(grid.height.tolist(), grid.width.tolist(), strict=True)):
        own = (grid.view == n).nonzero()[:, 0]
        y, x = grid.y[own], grid.x[own]
        assert own[0] == grid.first[n] and len(own) == height * width
        assert (y * width + x).tolist() == list(range(len(own)))  # read line by line
        if n == 0:
            assert (height, width) == GRIDS[family]


def layout_of(marks, position=None, modality=Modality.IMAGE):
    """One sequence: "." is text, a digit a patch of that image, "n" its newline."""
    ids = [-1 if mark == "." else int(mark) if mark.isdigit() else int(marks[n - 1]) for n, mark in enumerate(marks)]
    image_id, count = torch.tensor(ids), len(marks)
    return TokenLayout(
        sequence=torch.zeros(count, dtype=torch.int64),
        modality=torch.where(image_id >= 0, int(modality), 0).to(torch.int8),
        image_id=image_id,
        size=torch.tensor([float(mark != "n") for mark in marks]),
        source=torch.arange(count),
        position=torch.arange(count).double()[None] if position is None else position,
        next_position=torch.tensor([float(count)]),
    )


def shapes_of(layout):
    grid = grid_of(layout)
    return list(zip(grid.height.tolist(), grid.width.tolist(), strict=True))


def test_grids_that_marks_tell():
    assert shapes_of(layout_of("000n000n.1111.22222.3")) == [(2, 3), (2, 2), (1, 5), (1, 1)]
    assert shapes_of(layout_of("000000n00n00n")) == [(2, 2), (3, 2)]  # a small view of the whole stands before it
    assert shapes_of(layout_of("0n000n00n")) == [(1, 6)]  # lines of different lengths are no grid
    assert shapes_of(layout_of("....")) == []


def test_axes_that_fill_no_rectangle_tell_nothing():
    """A diagonal, as of tokens that stand one behind the other, and two tokens in one place."""
    assert shapes_of(layout_of("00000", torch.arange(5.0).double().expand(3, 5))) == [(1, 5)]
    twice = torch.tensor([[0, 0, 0, 0, 0, 0], [0, 0, 0, 1, 1, 1], [0, 1, 1, 0, 1, 2]]).double()
    assert shapes_of(layout_of("000000", twice)) == [(1, 6)]


def test_axes_in_any_order_and_of_any_step():
    """Tokens column by column, half a step apart in one direction and three in the other."""
    y, x = torch.tensor([0, 1, 0, 1, 0, 1]), torch.tensor([0, 0, 1, 1, 2, 2])
    layout = layout_of(
        "." + "0" * 6, torch.cat([torch.zeros(3, 1), torch.stack([0 * y, 7 + y / 2, 9 + 3.0 * x])], 1).double()
    )
    grid = grid_of(layout)
    assert torch.equal(grid.y, y) and torch.equal(grid.x, x) and shapes_of(layout) == [(2, 3)]
    right, below = grid.beside()
    assert right.tolist() == [2, 3, 4, 5, -1, -1] and below.tolist() == [1, -1, 3, -1, 5, -1]


def test_the_same_place_a_frame_later():
    """Frames column by column, with text behind the second, and one of another shape."""
    y, x = torch.tensor([0, 1, 0, 1]), torch.tensor([0, 0, 1, 1])
    place = torch.stack([0 * y, y, x]).double()
    row = torch.stack([0 * y, 0 * y, torch.arange(4)]).double()
    position = torch.cat([place, place, torch.zeros(3, 1), place.flip(1), place, row], 1)
    layout = layout_of("00001111.222233334444", position, Modality.VIDEO)
    later = grid_of(layout).later(layout).tolist()
    assert later == [4, 5, 6, 7, *[-1] * 4, 15, 14, 13, 12, *[-1] * 8]
    images = layout_of("00001111.222233334444", position)
    assert set(grid_of(images).later(images).tolist()) == {-1}


def test_frames_of_a_video_follow_each_other():
    adapter = adapter_for(tiny_model("qwen2_vl"))
    with torch.no_grad():
        _, layout = adapter.embed(tiny_inputs("qwen2_vl", [[3, VIDEO, 4], [VIDEO]]))
    later = grid_of(layout).later(layout)
    assert later.tolist() == [*range(8, 16), *[-1] * 8, *range(24, 32), *[-1] * 8]
