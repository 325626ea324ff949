"""An inspection tells which patches never went through the vision tower, and what stands for them."""

import numpy as np
import pytest

from mminfer import AIMMerge, InferenceConfig, PatchDedup
from mminfer.inspection.collecting import inspect_inputs
from mminfer.inspection.drawing import draw_image
from mminfer.inspection.page import page_html
from mminfer.inspection.words import sentences
from tests.inspection.stub import PROCESSOR
from tests.tiny import IMAGE, tiny_inputs, tiny_model


@pytest.mark.parametrize("merge", [None, AIMMerge(0.5)])
def test_what_was_never_encoded_is_told_and_drawn(merge):
    inputs = tiny_inputs("qwen2_5_vl", [[3, IMAGE, 4]])
    inputs["pixel_values"][48:] = 0.5  # the lower half of 4 x 6 cells of four patches
    config = InferenceConfig(tower=PatchDedup(), merge=merge)
    found = inspect_inputs(tiny_model("qwen2_5_vl"), PROCESSOR, config, inputs, 2)
    tokens, (image,) = found.tokens, found.images
    grid = image.grids[0]
    assert tokens.unencoded.sum() == 11 and tokens.unencoded[grid[2:]].sum() == 11
    owners = tokens.owner[grid[2:].ravel()]
    assert len(np.unique(owners)) == 1 and (tokens.owner[tokens.owner] == tokens.owner).all()
    assert tokens.size[grid.ravel()].sum() == 24 and (tokens.size[tokens.unencoded] == 0).all()
    assert tokens.present[0].sum() == found.stats.layer_rows[0] == len(tokens) - 24 + (13 if merge is None else 6)
    assert sentences(found)[0].startswith("PatchDedup: 11 of 24 visual tokens repeat others")
    if merge is not None:
        assert "13 visual tokens became 6" in sentences(found)[1]
    assert "Crossed" in page_html(found)
    plain = inspect_inputs(tiny_model("qwen2_5_vl"), PROCESSOR, InferenceConfig(), inputs, 2)
    assert not plain.tokens.unencoded.any() and "Crossed" not in page_html(plain)
    drawn, before = (np.asarray(draw_image(one, 0)).astype(int) for one in (found, plain))
    half = len(drawn) // 2
    assert (drawn != before)[half:].any()
