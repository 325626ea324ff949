"""Where an image's tokens stand: by M-RoPE's axes, by marks between lines, as a square, or in one line."""

import pytest
import torch

from mminfer.models.registry import adapter_for
from mminfer.tokens.grid import image_views, patch_places
from tests.tiny import FAMILIES, IMAGE, tiny_inputs, tiny_model

GRIDS = {  # of the first image or tile: lines, tokens a line
    "internvl": (4, 4), "llava": (4, 4), "mistral3": (4, 4), "idefics3": (4, 4), "smolvlm": (4, 4), "gemma3": (4, 4),
    "qwen2_vl": (4, 6), "qwen2_5_vl": (4, 6), "qwen3_vl": (4, 6), "llava_next": (4, 4), "llava_onevision": (4, 4),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_every_token_has_a_place_of_its_own(family):
    adapter = adapter_for(tiny_model(family))
    with torch.no_grad():
        _, layout = adapter.embed(tiny_inputs(family, [[3, IMAGE, 5, IMAGE, 4]]))
    patches = ((layout.image_id >= 0) & (layout.size > 0)).nonzero()[:, 0]
    views = image_views(layout)
    assert torch.equal(torch.cat(views), patches)
    for n, rows in enumerate(views):
        y, x = patch_places(rows, layout)
        assert len(set(zip(y.tolist(), x.tolist(), strict=True))) == len(rows)
        assert (int(y.max()) + 1) * (int(x.max()) + 1) == len(rows)
        assert (y * (int(x.max()) + 1) + x).tolist() == list(range(len(rows)))  # read line by line
        if n == 0:
            assert (int(y.max()) + 1, int(x.max()) + 1) == GRIDS[family]
