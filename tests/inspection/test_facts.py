"""What an inspection says is what happened, on every family, and looking changes nothing."""

import functools

import numpy as np
import pytest
import torch

from mminfer import V2PE, AIMMerge, AIMPrune, InferenceConfig, InputError, LookM, OperatorSkip, patched
from mminfer.cache.h2o import H2O
from mminfer.cache.random_evict import RandomEvict
from mminfer.cache.snapkv import SnapKV
from mminfer.inspection.collecting import inspect_inputs
from mminfer.inspection.recording import RecordedMerge, recording
from mminfer.models.registry import adapter_for
from mminfer.tokens.downsample import Downsample
from mminfer.tokens.fastv import FastV
from mminfer.tokens.random_prune import RandomPrune
from tests.inspection.stub import PROCESSOR, inspect_tiny
from tests.tiny import FAMILIES, IMAGE, LAYERS, MARKED_FAMILIES, VIDEO, fitting, tiny_inputs, tiny_model

EVERYTHING = InferenceConfig(
    positions=V2PE(1 / 16),
    merge=AIMMerge(0.5),
    prune=AIMPrune(start=1, end=4),
    skip=OperatorSkip(ffn=[0], attention=[2]),
    cache=LookM(0.2, 0.1),
)
GRIDS = {
    "llava_next": [(4, 4), (4, 8)],
    "llava_onevision": [(4, 4), (4, 8)],
    "qwen2_vl": [(4, 6)],
    "qwen2_5_vl": [(4, 6)],
    "qwen3_vl": [(4, 6)],
}
FRAMES = {"llava_onevision": (2, 2), "qwen2_vl": (2, 4), "qwen2_5_vl": (2, 4), "qwen3_vl": (2, 4)}


def prompt_of(family):
    return [3, IMAGE, 5, *([VIDEO] if FAMILIES[family].video else []), IMAGE, 4]


@functools.cache
def inspected(family):
    return inspect_tiny(family, fitting(family, EVERYTHING), prompt_of(family))


def record_of(family, config, prompt=None):
    """The raw record of one pass, and the cache it left."""
    config, record = recording(config)
    inputs = tiny_inputs(family, [prompt or prompt_of(family)])
    with patched(tiny_model(family), config):
        out = tiny_model(family)(**inputs, use_cache=True, logits_to_keep=1)
    return record, out.past_key_values


@pytest.mark.parametrize("family", FAMILIES)
def test_every_patch_lies_in_one_place_of_a_grid(family):
    found, facts = inspected(family), FAMILIES[family]
    images = [image for image in found.images if image.kind == "image"]
    frames = [image for image in found.images if image.kind == "frame"]
    assert len(images) == 2 * facts.tiles and len(frames) == (2 if facts.video else 0)
    for image in images:
        assert [grid.shape for grid in image.grids] == GRIDS.get(family, [(4, 4)])
    assert [grid.shape for frame in frames for grid in frame.grids] == [FRAMES.get(family)] * len(frames)
    numbers = np.concatenate([image.tokens for image in found.images])
    assert sorted(numbers) == np.flatnonzero(found.tokens.is_patch).tolist()
    for place, image in enumerate(found.images):
        assert (found.tokens.image[image.tokens] == place).all()
        for grid in image.grids:
            assert (np.diff(grid.ravel()) > 0).all()  # in the order of reading
    assert np.count_nonzero(found.tokens.image >= 0) == found.stats.visual_tokens
    assert [bool(text) for text in found.texts] == (found.tokens.image < 0).tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_groups_share_out_each_images_patches(family):
    found = inspected(family)
    tokens = found.tokens
    assert (tokens.owner[tokens.owner] == tokens.owner).all()
    assert (tokens.image[tokens.owner] == tokens.image).all()
    alone = ~tokens.is_patch
    assert (tokens.owner[alone] == np.flatnonzero(alone)).all()
    stands = tokens.owner == np.arange(len(tokens))
    assert stands.sum() == found.stats.merged_tokens
    members = np.bincount(tokens.owner[tokens.is_patch], minlength=len(tokens))
    assert (tokens.size[tokens.is_patch] == members[tokens.is_patch]).all()
    for image in found.images:
        assert tokens.size[image.tokens].sum() == len(image.tokens)
        assert np.count_nonzero(stands[image.tokens]) == len(image.tokens) // 2
    merged = members[tokens.owner] > 1
    assert ((tokens.group >= 0) == (merged & tokens.is_patch)).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_merged_token_is_the_mean_of_its_group(family):
    inputs = tiny_inputs(family, [prompt_of(family)])
    with torch.no_grad():
        embeds, layout = adapter_for(tiny_model(family)).embed(inputs)
    wrapped, record = recording(InferenceConfig(merge=AIMMerge(0.2)))
    assert isinstance(wrapped.merge, RecordedMerge)
    out, merged = wrapped.merge.apply(embeds, layout)
    assert type(merged) is type(layout) and len(out) < len(embeds)
    for row, source in zip(out, merged.source, strict=True):
        torch.testing.assert_close(row, embeds[record.merged_into == source].mean(0), rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_left_are_the_difference_of_the_rows(family):
    found = inspected(family)
    tokens = found.tokens
    assert tokens.present.sum(1).tolist() == list(found.stats.layer_rows) == [layer.rows for layer in found.layers]
    for i, layer in enumerate(found.layers[:-1]):
        gone = tokens.present[i] & ~tokens.present[i + 1]
        assert layer.left == gone.sum() and not (tokens.present[i + 1] & ~tokens.present[i]).any()
        assert (tokens.layers_entered[gone] == i + 1).all() and ((tokens.left == i) == gone).all()
    assert tokens.present[:, tokens.image < 0].all()
    stands = tokens.owner == np.arange(len(tokens))
    assert (tokens.present[0] == stands).all()
    if fitting(family, EVERYTHING).prune is not None:
        assert found.leaving_layers == (1, 2, 3)
        first = found.leaving_layers[0]
        visual = tokens.present[first] & (tokens.image >= 0)
        stays = tokens.present[first + 1]
        assert tokens.importance[visual & stays].min() >= tokens.importance[visual & ~stays].max()
        assert np.nanmax(tokens.rank) == 1 and np.nanmin(tokens.rank[tokens.is_patch]) == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_evicted_entries_make_up_for_the_cache(family):
    found = inspected(family)
    tokens, spec = found.tokens, adapter_for(tiny_model(family)).spec
    if spec.sliding_layers:
        assert not found.evicts
        return
    assert found.evicts and tokens.num_heads == spec.num_key_value_heads
    assert (tokens.held <= tokens.present * tokens.num_heads).all() and (tokens.held >= 0).all()
    for i, layer in enumerate(found.layers):
        assert tokens.held[i].sum() == layer.entries * tokens.num_heads
        own = tokens.owner == np.arange(len(tokens))
        assert tokens.gone[i][own].sum() == (layer.rows - layer.entries) * tokens.num_heads
    assert sum(layer.cache_bytes for layer in found.layers) == found.stats.cache_bytes
    assert sum(layer.full_cache_bytes for layer in found.layers) == found.full_stats.cache_bytes
    text = tokens.image < 0
    assert (tokens.evicted[text] == 0).all() and tokens.evicted.max() <= 1


@pytest.mark.parametrize("family", [f for f in FAMILIES if fitting(f, EVERYTHING).cache is not None])
def test_the_entries_held_are_those_tokens_keys(family):
    """Nothing is merged into them here, and keys of the first layer follow from the token and its place alone."""
    record, cache = record_of(family, InferenceConfig(cache=LookM(0.2, 0.1, merge="none")))
    full_record, full = record_of(family, InferenceConfig())
    assert full_record.held == {} and len(cache.layers[0].row(0)) < len(full.layers[0].row(0))
    keys = full.layers[0].row(0).keys[0]
    for head, rows in enumerate(record.held[0]):
        assert torch.equal(cache.layers[0].row(0).keys[0, head], keys[head, rows])
    assert full.layers[0].row(0).source is None  # nobody asked


@pytest.mark.parametrize("family", MARKED_FAMILIES)
def test_looking_changes_nothing(family):
    model, config = tiny_model(family), fitting(family, EVERYTHING)
    inputs = tiny_inputs(family, [prompt_of(family)])
    kwargs = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    runs = []
    for each in (config, recording(config)[0], InferenceConfig(), recording(InferenceConfig())[0]):
        with patched(model, each) as handle:
            runs.append((model.generate(**inputs, **kwargs), handle.records[-1]))
    for (plain, plain_record), (looked, looked_record) in (runs[:2], runs[2:]):
        assert torch.equal(plain.sequences, looked.sequences)
        assert all(torch.equal(a, b) for a, b in zip(plain.logits, looked.logits, strict=True))
        assert plain_record == looked_record
    found = inspected(family)
    new = runs[0][0].sequences[0, inputs["input_ids"].shape[1] :].tolist()
    assert found.answer == PROCESSOR.tokenizer.decode(new[: found.stats.new_tokens]).strip()
    assert found.full_stats.layer_rows == (found.stats.prompt_tokens,) * LAYERS
    assert found.first_token_kl > 0
    assert "forward" not in vars(model)


def test_layers_say_what_they_skip():
    assert [layer.skipped for layer in inspected("internvl").layers] == [("FFN",), (), ("queries",), ()]
    # 12 text tokens and 2 images of 16, whose tokens stand 1/16 apart
    found = inspected("internvl")
    assert (found.full_last_position, found.last_position) == (47, 17)


def test_a_last_visual_token_that_stays_is_not_told_as_left():
    """It asks for the next token, so it outlives the pruning behind the last layer."""
    found = inspect_tiny("llava", InferenceConfig(prune=AIMPrune(start=1, end=LAYERS)), [3, IMAGE])
    assert found.tokens.left[-1] == -1 and (found.tokens.left[3:-1] >= 1).all()
    assert sum(layer.left for layer in found.layers) == 15


def test_shading_falls_back_to_the_score_and_then_to_none():
    prompt = [3, IMAGE, 5, IMAGE, 4]
    by_prune = inspect_tiny("internvl", InferenceConfig(prune=RandomPrune(1, 3)), prompt)
    assert by_prune.importance_from == "importance by RandomPrune behind layer 1"
    by_last = inspect_tiny("internvl", InferenceConfig(prune=FastV(2, 0.5)), prompt)
    assert by_last.importance_from == "importance by FastV behind layer 1" and by_last.layers[1].left == 16
    left = by_last.tokens.left == 1
    assert by_last.tokens.importance[left].max() <= by_last.tokens.importance[by_last.tokens.is_patch & ~left].min()
    by_cache = inspect_tiny("internvl", InferenceConfig(cache=LookM(0.2, 0.1)), prompt)
    assert by_cache.importance_from.startswith("score by LookM")
    assert np.isfinite(by_cache.tokens.importance).all()
    assert by_cache.tokens.importance.sum() == pytest.approx(1, abs=1e-4)
    by_lot = inspect_tiny("internvl", InferenceConfig(cache=RandomEvict(0.2, 0.1)), prompt)
    assert by_lot.importance_from.startswith("score by RandomEvict") and by_lot.evicts
    off = inspect_tiny("internvl", InferenceConfig(), prompt)
    assert off.importance_from == "" and np.isnan(off.tokens.rank).all()
    assert off.answer == off.full_answer and off.first_token_kl == 0 and not off.evicts


BASELINES = {
    "downsample": InferenceConfig(merge=Downsample(0.25)),
    "h2o": InferenceConfig(cache=H2O(0.2, 0.1)),
    "snapkv": InferenceConfig(cache=SnapKV(0.2, 0.1)),
}


@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.parametrize("family", ["internvl", "llava_next", "qwen2_vl"])
def test_baselines_are_told_as_well(family, name):
    found = inspect_tiny(family, BASELINES[name], prompt_of(family))
    tokens = found.tokens
    assert (tokens.owner == np.arange(len(tokens))).sum() == found.stats.merged_tokens
    assert (tokens.held.sum(1) == np.array(found.stats.layer_entries) * tokens.num_heads).all()
    assert found.evicts == (name != "downsample") == bool(found.importance_from)
    assert (tokens.group >= 0).any() == (name == "downsample")


def test_positions_without_a_grid_give_a_line():
    inputs = tiny_inputs("qwen2_vl", [[3, IMAGE, 4]])
    inputs["position_ids"] = torch.arange(inputs["input_ids"].shape[1])[None]
    found = inspect_inputs(tiny_model("qwen2_vl"), PROCESSOR, InferenceConfig(), inputs, 1)
    assert [grid.shape for grid in found.images[0].grids] == [(1, 24)]


def test_groups_may_cross_frames():
    config = InferenceConfig(merge=AIMMerge(0.2, across_frames=True))
    found = inspect_tiny("qwen2_vl", config, [3, VIDEO, 4])
    tokens = found.tokens
    crosses = tokens.image != tokens.image[tokens.owner]
    assert crosses.any() and (tokens.group[crosses] == tokens.group[tokens.owner[crosses]]).all()
    assert len(found.images) == 2 and tokens.size[tokens.is_patch].sum() == 16


def test_a_prompt_without_images():
    found = inspect_tiny("llava", EVERYTHING, [20])
    assert found.images == () and len(found.texts) == 20
    assert found.texts[0].startswith(" w") and found.tokens.evicted.max() == 0


def test_text_loses_entries_under_a_budget():
    config = InferenceConfig(cache=LookM(budget=12, recent=4))
    with pytest.warns(UserWarning, match="text alone"):
        found = inspect_tiny("llava", config, [20, IMAGE, 4])
    text = found.tokens.image < 0
    assert found.tokens.evicted[text].max() > 0 and [layer.entries for layer in found.layers] == [12] * LAYERS


def test_a_batch_is_refused():
    inputs = tiny_inputs("llava", [[3], [4]])
    with pytest.raises(InputError, match="2 rows; an inspection takes one chat"):
        inspect_inputs(tiny_model("llava"), PROCESSOR, EVERYTHING, inputs)
    with pytest.raises(InputError, match="none; an inspection takes one chat"):
        inspect_inputs(tiny_model("llava"), PROCESSOR, EVERYTHING, {})
