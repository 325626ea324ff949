"""Pictures: their size, and the marks where the facts are."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from mminfer import AIMMerge, InferenceConfig
from mminfer.inspection.colours import LEAST_DIM, MOST_DIM, STRIKE, dimness, group_colour
from mminfer.inspection.drawing import GAP, LEAST_SIDE, MOST_SIDE, draw_image, picture_size
from mminfer.inspection.facts import ImageFacts
from tests.inspection.stub import inspect_tiny
from tests.tiny import IMAGE


@pytest.mark.parametrize("preset", ["balanced", "lookm-20", "digest-20", "off"])
def test_a_picture_has_the_size_of_its_grid(nano_inspection, preset):
    found = nano_inspection(preset)
    assert len(found.images) == 8
    for place in range(8):
        assert draw_image(found, place).size == (LEAST_SIDE, LEAST_SIDE)


def test_sizes_follow_the_picture_then_the_grid():
    grid = np.arange(40 * 50).reshape(40, 50)
    assert picture_size(ImageFacts("image", (grid,)), grid) == (MOST_SIDE, round(MOST_SIDE * 0.8))
    wide = ImageFacts("image", (grid,), Image.new("RGB", (600, 200)))
    assert picture_size(wide, grid) == (MOST_SIDE, round(MOST_SIDE / 3))
    small = np.arange(6).reshape(2, 3)
    assert picture_size(ImageFacts("frame", (small,)), small) == (LEAST_SIDE, LEAST_SIDE * 2 // 3)


def test_two_grids_stand_side_by_side_without_a_picture():
    found = inspect_tiny("llava_next", InferenceConfig(merge=AIMMerge(0.5)), [3, IMAGE, 4])
    drawn = draw_image(found, 0)
    assert drawn.size == (LEAST_SIDE + GAP + LEAST_SIDE, LEAST_SIDE)
    assert drawn.getpixel((LEAST_SIDE + GAP // 2, 100)) == (255, 255, 255)


def grey(found):
    """The inspection with a grey picture under each grid."""
    return replace(found, images=tuple(replace(image, picture=None) for image in found.images))


def cells(picture, count=8):
    """[count * count, pixels, 3] of a square picture, cell by cell."""
    side = LEAST_SIDE // count
    values = np.asarray(picture).reshape(count, side, count, side, 3)
    return values.transpose(0, 2, 1, 3, 4).reshape(count * count, side * side, 3).astype(int)


def near(values, colour):
    return (np.abs(values - np.array(colour)).sum(-1) < 60).sum(-1)


def test_strikes_are_as_long_as_the_share(nano_inspection):
    found = grey(nano_inspection("lookm-20"))
    for place, image in enumerate(found.images):
        struck = near(cells(draw_image(found, place)), STRIKE)
        shares = found.tokens.evicted[image.grids[0].ravel()]
        assert ((struck > 0) == (shares > 0)).all()
        assert np.ptp(shares) < 0.1 or np.corrcoef(struck, shares)[0, 1] > 0.95


def test_patches_that_left_earlier_are_darker(nano_inspection):
    found = grey(nano_inspection("balanced"))
    tokens = replace(found.tokens, importance=np.full(len(found.tokens), np.nan, np.float32))
    for place, image in enumerate(found.images):
        brightness = np.median(cells(draw_image(replace(found, tokens=tokens), place)).mean(-1), axis=1)
        left = tokens.left[tokens.owner[image.grids[0].ravel()]]
        early, late = brightness[left == 3], brightness[left == 4]
        assert not len(early) or early.max() < late.min()


def test_the_dark_tells_layers_apart_and_hides_no_more_than_it_must():
    assert dimness(-1, (3, 4), True) == 0 < dimness(4, (3, 4), True) < dimness(3, (3, 4), True) == MOST_DIM
    assert dimness(4, (3, 4), False) == dimness(3, (3,), False) == LEAST_DIM
    assert dimness(3, (3,), True) == dimness(3, (3, 4), False) == MOST_DIM


def test_important_patches_are_amber(nano_inspection):
    found = grey(nano_inspection("balanced"))
    found = replace(found, tokens=replace(found.tokens, left=np.full(len(found.tokens), -1)))
    for place, image in enumerate(found.images):
        pixels = np.median(cells(draw_image(found, place)), axis=1)
        amber = pixels[:, 0] - pixels[:, 2]
        order = found.tokens.rank[image.grids[0].ravel()].argsort()
        assert (np.diff(amber[order]) >= -1).all() and np.ptp(amber) > 20


def test_outlines_stand_between_groups_and_dots_where_they_stand(nano_inspection):
    found = grey(nano_inspection("aim"))
    tokens = found.tokens
    for place, image in enumerate(found.images):
        drawn, grid = np.asarray(draw_image(found, place)).astype(int), image.grids[0]
        side = LEAST_SIDE // 8
        for (row, column), token in np.ndenumerate(grid):
            group = int(tokens.group[token])
            centre = drawn[row * side + side // 2, column * side + side // 2]
            assert (near(centre, group_colour(group)) > 0) == (group >= 0 and tokens.owner[token] == token)
            if column < 7 and group >= 0:
                edge = drawn[row * side + side // 2, (column + 1) * side - 2]
                apart = tokens.owner[token] != tokens.owner[grid[row, column + 1]]
                assert (near(edge, group_colour(group)) > 0) == apart
