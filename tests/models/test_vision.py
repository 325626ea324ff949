"""Vision towers counted by geometry where they differ: images of several sizes, padding, windows, towers of others."""

from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, PixtralVisionConfig

from mminfer import UnsupportedModelError
from mminfer.layout import Modality
from mminfer.metrics.flops import measured_flops
from mminfer.metrics.records import shares
from mminfer.metrics.vision import tower_flops, vision_flops, vision_shares
from mminfer.models.registry import adapter_for
from tests.tiny import IMAGE, tiny_inputs, tiny_model
from tests.tiny_models import IMAGE_ID, TEXT, VISION


def agree(adapter, inputs):
    """Both counts of the encoder, which must be the same."""
    with torch.no_grad(), measured_flops() as counter:
        adapter.visual_units(inputs)
    flops = vision_flops(adapter, inputs)
    assert flops.total == counter.get_total_flops()
    return flops


def pixels(*sizes, patch=4):
    """Model inputs of images of these sizes, padded to the largest."""
    values = torch.zeros(len(sizes), 3, max(h for h, _ in sizes), max(w for _, w in sizes))
    for image, (h, w) in zip(values, sizes, strict=True):
        image[:, :h, :w] = torch.randn(3, h, w)
    return {"pixel_values": values, "image_sizes": torch.tensor(sizes)}


def test_packed_images_look_at_themselves_alone():
    adapter = adapter_for(tiny_model("mistral3"))
    flops = agree(adapter, pixels((32, 32), (16, 24)))
    assert flops.attention == 4 * 32 * 2 * (64**2 + 24**2)  # two layers of width 32
    assert flops.patches == 2 * (32 * 3 * 16) * 2 * 64  # padding is cut into patches too


def test_llava_with_pixtrals_tower():
    vision = PixtralVisionConfig(**VISION, image_size=32, patch_size=4)
    config = LlavaConfig(
        vision_config=vision, text_config=LlamaConfig(**TEXT), image_token_id=IMAGE_ID, vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )  # fmt: skip
    adapter = adapter_for(LlavaForConditionalGeneration(config).eval())
    flops = agree(adapter, pixels((16, 32), (16, 16)))
    assert flops.projector == 2 * (32 * 64 + 64 * 64) * (32 + 16)


@pytest.mark.parametrize("family", ["idefics3", "smolvlm"])
def test_no_patch_looks_at_padding(family):
    adapter, inputs = adapter_for(tiny_model(family)), tiny_inputs(family, [[3, IMAGE, 5], [2]])
    whole = agree(adapter, inputs)
    inputs["pixel_attention_mask"][0, 0, :, 16:] = 0
    half = agree(adapter, inputs)
    assert whole.attention == 4 * 32 * 2 * (2 * 64**2) and half.attention == 4 * 32 * 2 * (64 * 32 + 64**2)
    assert half.ffn == whole.ffn  # padding goes through all else
    assert vision_shares(adapter, inputs, [32, 0]) == (half.total, 0)  # the second prompt's tiles are all padding


def test_windows_are_cut_at_the_edges():
    adapter = adapter_for(tiny_model("qwen2_5_vl"))
    grids = [[1, 10, 6], [2, 4, 4]]
    rows = sum(t * h * w for t, h, w in grids)
    inputs = {"pixel_values": torch.randn(rows, 3 * 2 * 16), "image_grid_thw": torch.tensor(grids)}
    flops = agree(adapter, inputs)
    # the first layer looks through windows of 4 by 4 patches, the second at whole frames
    windows = (16 + 16 + 4) * (16 + 4) + 2 * 16 * 16
    assert flops.attention == 4 * 32 * (windows + 60**2 + 2 * 16**2)


def test_tiles_that_are_padding_are_left_out():
    adapter = adapter_for(tiny_model("llava_next"))
    inputs = {"pixel_values": torch.randn(2, 3, 3, 16, 16), "image_sizes": torch.tensor([[16, 32], [16, 16]])}
    assert agree(adapter, inputs).patches == 2 * (32 * 3 * 16) * (3 + 2) * 16


def test_images_of_several_in_a_prompt_are_not_cut():
    adapter = adapter_for(tiny_model("llava_onevision"))
    sizes = torch.tensor([[16, 32], [16, 32], [16, 32]])
    inputs = {
        "pixel_values": torch.randn(3, 3, 3, 16, 16),
        "image_sizes": sizes,
        "batch_num_images": torch.tensor([1, 2]),
    }
    assert agree(adapter, inputs).patches == 2 * (32 * 3 * 16) * (3 + 1 + 1) * 16


def test_a_tower_of_unknown_build():
    adapter, inputs = adapter_for(tiny_model("llava")), tiny_inputs("llava", [[3, IMAGE]])
    layers = adapter.base.vision_tower.encoder._modules.pop("layers")
    try:
        with pytest.raises(UnsupportedModelError, match=r"no vision_tower\.encoder\.layers"):
            vision_flops(adapter, inputs)
        with pytest.warns(UserWarning, match="reported as 0"):
            assert vision_shares(adapter, inputs, [16]) == ()
    finally:
        adapter.base.vision_tower.encoder.layers = layers
    assert vision_flops(adapter, inputs).total > 0


def test_older_hosts_wrap_the_tower_once_more():
    adapter, inputs = adapter_for(tiny_model("llava")), tiny_inputs("llava", [[3, IMAGE]])
    tower, base = adapter.tower, adapter.base
    wrapped = SimpleNamespace(vision_model=base.vision_tower)
    tower.base = SimpleNamespace(vision_tower=wrapped, multi_modal_projector=base.multi_modal_projector)
    assert tower_flops(tower, tower.work(Modality.IMAGE, inputs)) == vision_flops(adapter, inputs)


def test_shares():
    assert shares(100, [1, 2, 0]) == (33, 67, 0)
    assert shares(10, [0, 0]) == (0, 0) and sum(shares(7, [3, 3, 3])) == 7
