"""What holds of every family."""

import pytest
import torch
from transformers import MistralConfig

from mminfer import V2PE, AIMMerge, AIMPrune, ConfigError, InferenceConfig, LookM, OperatorSkip, patched
from mminfer.models.adapter import ModelAdapter
from mminfer.models.registry import adapter_for, supported_families
from tests.doors import same_by_both_doors
from tests.tiny import FAMILIES, IMAGE, VIDEO, fitting, refusal, tiny_inputs, tiny_model

REFUSED = [
    ("gemma3", InferenceConfig(prune=AIMPrune(0, 2)), "both directions"),
    ("gemma3", InferenceConfig(skip=OperatorSkip(attention=[1])), "attention: images of this model attend in both"),
    ("gemma3", InferenceConfig(skip=OperatorSkip(block=[1])), "block: images of this model attend in both"),
    ("gemma3", InferenceConfig(cache=LookM()), "2 of 4 layers attend within a sliding window"),
]


def test_every_family_has_its_row():
    assert sorted(FAMILIES) == supported_families()


@pytest.mark.parametrize("family", FAMILIES)
def test_images_are_cut_where_the_model_cut_them(family):
    """Merging stays inside a tile or a frame, and away from newlines."""
    spec = FAMILIES[family]
    prompt = [5, IMAGE, 3, VIDEO, 2, IMAGE] if spec.video_tokens else [5, IMAGE, 3, IMAGE]
    layout = adapter_for(tiny_model(family)).embed(tiny_inputs(family, [prompt]))[1]
    image = (spec.patches // spec.tiles,) * spec.tiles
    video = (spec.video_patches // 2,) * 2 if spec.video_tokens else ()
    assert sorted(layout.image_lengths) == sorted(2 * image + video)


@pytest.mark.parametrize("family", FAMILIES)
def test_precise_tables_are_the_hosts(family):
    """Angles formed in float64 give the host's tables, on every axis and for every kind of layer."""
    prompt = [5, IMAGE, 3, VIDEO, 2] if FAMILIES[family].video_tokens else [5, IMAGE, 3]
    adapter = adapter_for(tiny_model(family))
    with torch.no_grad():
        embeds, layout = adapter.embed(tiny_inputs(family, [prompt]))
    position = layout.position[:, None]
    precise, host = (adapter.rotary(embeds[None], position, x) for x in (True, False))
    assert precise.keys() == host.keys() == set(adapter.layer_kinds)
    for kind in host:
        for ours, theirs in zip(precise[kind], host[kind], strict=True):
            if theirs.dim() == ours.dim():  # older hosts give a table an axis
                torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_two_turns_are_the_hosts_one_pass(family):
    """An image in each turn: the second goes on where the first left off."""
    model = tiny_model(family)
    first, second = (tiny_inputs(family, [prompt], seed) for seed, prompt in enumerate([[5, IMAGE, 3], [9, IMAGE, 6]]))
    along_tokens = {name for name in first if first[name].shape == first["input_ids"].shape}
    if FAMILIES[family].padded:
        along_tokens |= {"pixel_values", "pixel_attention_mask"}
    whole = {name: torch.cat([first[name], second[name]], int(name in along_tokens)) for name in first}
    host = model(**whole).logits[:, -1]
    with patched(model, InferenceConfig()):
        cache = model(**first, use_cache=True).past_key_values
        second["attention_mask"] = whole["attention_mask"]
        ours = model(**second, past_key_values=cache, use_cache=True).logits[:, -1]
    torch.testing.assert_close(ours, host, rtol=0, atol=1e-4)


@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_both_doors_give_the_same(family, everything):
    techniques = InferenceConfig(V2PE(1 / 4), AIMMerge(0.5), AIMPrune(1, 3), OperatorSkip(ffn=[0]), LookM(0.2, 0.1))
    config = fitting(family, techniques) if everything else InferenceConfig()
    model, inputs = tiny_model(family), tiny_inputs(family, [[3, IMAGE, 9], [6]])
    outputs = same_by_both_doors(model, inputs, config, 5)
    share = [out.stats.prompt_flops / out.stats.full_prompt_flops for out in outputs]
    assert share[0] < 0.95 if everything else share == [1, 1]


@pytest.mark.parametrize(("family", "config", "reason"), REFUSED)
def test_what_cannot_apply_is_refused_with_the_reason(family, config, reason):
    spec = adapter_for(tiny_model(family)).spec
    with pytest.raises(ConfigError, match=reason):
        config.check(spec)


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "gemma3"])
def test_nothing_is_refused_elsewhere(family):
    assert refusal(family, InferenceConfig(None, None, AIMPrune(0, 2), OperatorSkip([0], [1], [2]), LookM())) is None


def test_a_window_without_layer_types_is_that_of_every_layer():
    spec = ModelAdapter.spec_of("mistral3", MistralConfig(num_hidden_layers=3, sliding_window=7))
    assert (spec.sliding_layers, spec.sliding_window) == ((0, 1, 2), 7)
    spec = ModelAdapter.spec_of("mistral3", MistralConfig(num_hidden_layers=3, sliding_window=None))
    assert (spec.sliding_layers, spec.sliding_window) == ((), None)
