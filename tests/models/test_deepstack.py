"""DeepStack's features go where their tokens go: averaged with them, selected with them."""

from dataclasses import replace

import pytest
import torch

from mminfer import AIMMerge, AIMPrune, InferenceConfig, RegionMerge
from mminfer.forward.kv_cache import CompressedCache
from mminfer.forward.prefill import PassOptions, prompt_pass
from mminfer.layout import TokenLayout
from mminfer.models.registry import adapter_for
from tests.tiny import IMAGE, VIDEO, tiny_inputs, tiny_model

PROMPTS = [[3, IMAGE, 5, VIDEO, 4], [2, VIDEO, 9, IMAGE], [6]]


def embedded() -> tuple[torch.Tensor, TokenLayout]:
    adapter = adapter_for(tiny_model("qwen3_vl"))
    with torch.no_grad():
        return adapter.embed(tiny_inputs("qwen3_vl", PROMPTS))


@pytest.mark.parametrize("merge", [AIMMerge(0.6), AIMMerge(0.25), AIMMerge(0.1), RegionMerge(None, None, 0.3)])
def test_companions_are_averaged_like_their_tokens(merge):
    embeds, layout = embedded()
    as_tokens = replace(layout, companions=embeds[layout.visual_rows][:, None])
    merged, left = merge.apply(embeds, as_tokens)
    assert len(left.visual_rows) < len(layout.visual_rows)
    torch.testing.assert_close(left.companions[:, 0], merged[left.visual_rows], rtol=0, atol=1e-5)


def test_companions_are_selected_with_their_rows():
    embeds, layout = embedded()
    as_tokens = replace(layout, companions=embeds[layout.visual_rows][:, None])
    kept = (torch.arange(len(layout)) % 3 != 1).nonzero()[:, 0]
    left = as_tokens.select(kept)
    assert torch.equal(left.companions[:, 0], embeds[kept][left.visual_rows])


def test_frames_are_images_of_their_own():
    _, layout = embedded()
    assert layout.image_lengths == (24, 8, 8, 8, 8, 24)


@pytest.mark.parametrize("level", range(3))
def test_every_level_joins_behind_its_layer(level):
    """Against the host's own layers on the same rows, features of one level only, added by hand."""
    model = tiny_model("qwen3_vl")
    inputs = tiny_inputs("qwen3_vl", [[3, IMAGE, 5]])
    embeds, layout = adapter_for(model).embed(inputs)
    own = layout.companions.clone()
    own[:, [x for x in range(3) if x != level]] = 0
    with torch.no_grad():
        host = model.model.language_model(
            inputs_embeds=embeds[None],
            position_ids=layout.position[:, None].long(),
            visual_pos_masks=layout.is_visual[None],
            deepstack_visual_embeds=list(own.unbind(1)),
        ).last_hidden_state[0]
        adapter, config = adapter_for(model), InferenceConfig()
        ours = prompt_pass(
            adapter, config, embeds, replace(layout, companions=own), CompressedCache(), PassOptions(len(layout))
        )
        torch.testing.assert_close(adapter.language_model.norm(ours.hidden), host, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("start", "end"), [(0, 2), (1, 2), (0, 1)])
def test_features_of_pruned_rows_join_nobody(start, end):
    """Levels that come behind a layer that drops every visual row are as good as not there."""
    model = tiny_model("qwen3_vl")
    embeds, layout = embedded()
    adapter, config = adapter_for(model), InferenceConfig(prune=AIMPrune(start, end))
    late = layout.companions.clone()
    late[:, end:] = 1e3
    outs = [
        prompt_pass(
            adapter, config, embeds, replace(layout, companions=x), CompressedCache(), PassOptions(len(layout))
        ).last
        for x in (layout.companions, late)
    ]
    assert torch.equal(*outs)
