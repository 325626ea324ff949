"""Prompts in chunks: where nothing is evicted they equal the prompt at once; where something is, memory is bounded."""

import pytest
import torch

from mminfer import (
    V2PE,
    AIMMerge,
    AIMPrune,
    ConfigError,
    InferenceConfig,
    InputError,
    LookM,
    OperatorSkip,
    patch,
    patched,
)
from mminfer.forward.call_state import CallState
from mminfer.forward.kv_cache import CACHE_NAME
from tests.tiny import FAMILIES, IMAGE, MARKED_FAMILIES, VIDEO, skip_if_refused, tiny_inputs, tiny_model
from tests.tiny_models import VIDEO_ID

PROMPTS = [[3, IMAGE, IMAGE, 5, IMAGE, 4], [2, IMAGE, 9]]
CONFIGS = {
    "off": InferenceConfig(),
    "v2pe": InferenceConfig(V2PE(1 / 16)),
    "merge": InferenceConfig(V2PE(0.3), AIMMerge(0.5)),
    "skip": InferenceConfig(skip=OperatorSkip(ffn=[0, 2])),
    "skip-attention": InferenceConfig(skip=OperatorSkip(attention=[1])),
    "lookm-all": InferenceConfig(cache=LookM(1.0, 0.0)),
    "lookm-roomy": InferenceConfig(cache=LookM(budget=10_000)),
}


def largest_image(family):
    return max(FAMILIES[family].image_tokens // FAMILIES[family].tiles, 12)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("family", MARKED_FAMILIES)
def test_chunks_equal_the_prompt_at_once(family, config):
    """Logits of every position, and what is generated, of a padded batch with images that touch each other."""
    skip_if_refused(family, config)
    model, inputs = tiny_model(family), tiny_inputs(family, PROMPTS)
    outs = []
    for size in (None, largest_image(family)):
        with patched(model, config, prefill_chunk_size=size) as handle:
            logits = model(**inputs, use_cache=True).logits
            ids = model.generate(**inputs, max_new_tokens=5, do_sample=False)
            outs.append((logits, ids, handle.records[-1]))
    (whole, ids, record), (chunked, chunked_ids, chunked_record) = outs
    torch.testing.assert_close(chunked, whole, rtol=0, atol=1e-4)
    assert torch.equal(chunked_ids, ids)
    assert chunked_record == record
    assert [x.pairs for x in chunked_record.layers] == [x.pairs for x in record.layers]


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "gemma3"])
@pytest.mark.filterwarnings("ignore:LookM")
def test_no_layer_ever_sees_more_than_budget_and_chunk(family):
    model, inputs = tiny_model(family), tiny_inputs(family, [[3, *[IMAGE] * 6, 4], [2, IMAGE, 9]])
    size = largest_image(family)
    with patched(model, InferenceConfig(cache=LookM(budget=8)), prefill_chunk_size=size) as handle:
        cache = model(**inputs, use_cache=True, logits_to_keep=1)[CACHE_NAME]
    assert cache.lengths == [[8, 8]] * len(cache.layers)
    (record,) = handle.records
    tokens = record.prompt[0]
    assert record.layers[0].rows == record.prompt
    assert record.layers[0].pairs[0] <= tokens * (8 + size)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("delta", [1, 1 / 16, 0.3])
def test_a_prompt_that_is_cut_between_two_images_stands_where_it_stood(family, delta):
    """Two calls of the patched model: a run of visual tokens goes on where the first one left it."""
    model, config = tiny_model(family), InferenceConfig(V2PE(delta))
    first, both = (tiny_inputs(family, [p]) for p in ([3, IMAGE], [3, IMAGE, IMAGE, 4]))
    second = tiny_inputs(family, [[IMAGE, 4]])
    start = first["input_ids"].shape[1]
    pixels = [name for name in both if name.startswith(("pixel", "image"))]
    halves = {name: both[name] for name in pixels}
    for name in pixels:
        cut = first[name].shape[0] if first[name].shape[1:] == both[name].shape[1:] else None
        halves[name] = both[name][cut:] if cut is not None else both[name][:, first[name].shape[1] :]
        first[name] = both[name][:cut] if cut is not None else both[name][:, : first[name].shape[1]]
    second |= halves | {"input_ids": both["input_ids"][:, start:]}
    second.pop("attention_mask")
    first["input_ids"] = both["input_ids"][:, :start]
    with patched(model, config):
        cache = model(**first, use_cache=True, logits_to_keep=1)[CACHE_NAME]
        pieces = model(**second, **{CACHE_NAME: cache}, use_cache=True).logits
        whole = model(**both, use_cache=True).logits[:, start:]
    torch.testing.assert_close(pieces, whole, rtol=0, atol=1e-4)


def test_a_chunk_smaller_than_an_image_is_refused_and_the_cache_stays():
    model, inputs = tiny_model("internvl"), tiny_inputs("internvl", [[3, IMAGE, 2]])
    wanted = r"prefill_chunk_size=10.* 16 tokens.*at least 16"
    with patched(model, InferenceConfig(), prefill_chunk_size=10), pytest.raises(InputError, match=wanted):
        model(**inputs)
    with pytest.raises(ConfigError, match="prefill_chunk_size=0"):
        patch(model, InferenceConfig(), prefill_chunk_size=0)


@pytest.mark.filterwarnings("ignore:LookM")
def test_an_error_in_a_later_chunk_leaves_the_cache_as_it_was(monkeypatch):
    model = tiny_model("internvl")
    inputs, more = (tiny_inputs("internvl", [p]) for p in ([3, IMAGE], [2, IMAGE, IMAGE, IMAGE]))
    more.pop("attention_mask")
    with patched(model, InferenceConfig(cache=LookM(budget=9)), prefill_chunk_size=18) as handle:
        cache = model(**inputs, use_cache=True, logits_to_keep=1)[CACHE_NAME]
        layers, keys, facts = cache.layers, cache.layers[0].keys.clone(), (cache.tokens, cache.logical_length)
        chunks = []

        def stop(tokens):
            chunks.append(tokens)
            if len(chunks) == 2:
                raise KeyboardInterrupt

        with handle.begin(CallState(chunk_size=18, progress=stop)), pytest.raises(KeyboardInterrupt):
            model(**more, **{CACHE_NAME: cache}, use_cache=True, logits_to_keep=1)
    assert cache.layers is layers and torch.equal(cache.layers[0].keys, keys)
    assert (cache.tokens, cache.logical_length) == facts


def test_pruning_judges_one_chunk_at_a_time():
    model, inputs = tiny_model("internvl"), tiny_inputs("internvl", [[3, IMAGE, IMAGE, 4]])
    config, rows = InferenceConfig(prune=AIMPrune(start=1, end=3)), {}
    for size in (None, 20):
        with patched(model, config, prefill_chunk_size=size) as handle:
            model(**inputs, use_cache=True, logits_to_keep=1)
        rows[size] = [layer.rows[0] for layer in handle.records[-1].layers]
    assert rows[20][:2] == rows[None][:2]
    assert all(0 <= a - b <= 1 for a, b in zip(rows[20], rows[None], strict=True))  # rounded down chunk by chunk


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
def test_text_behind_a_long_video_is_gone_on_from(family):
    """A video reaches further on the axis of time than the text behind it; the next stretch goes on from the text."""
    model = tiny_model(family)
    first, both = (tiny_inputs(family, [p]) for p in ([3, VIDEO, 2], [3, VIDEO, 2, IMAGE, 4]))
    long = {"video_grid_thw": torch.tensor([[24, 4, 8]])}
    start = first["input_ids"].shape[1]
    video = torch.randn(24 * 4 * 8, 3 * 2 * 16, generator=torch.Generator().manual_seed(0))
    marks = (first["input_ids"][0] == VIDEO_ID).nonzero()[:, 0]
    ids = first["input_ids"][0]
    head = torch.cat([ids[: marks[0]], torch.full((24 * 8,), VIDEO_ID), ids[marks[-1] + 1 :]])[None]
    tail = both["input_ids"][:, start:]
    clip = {"pixel_values_videos": video, **long}
    image = {name: both[name] for name in ("pixel_values", "image_grid_thw")}
    with patched(model, InferenceConfig()):
        cache = model(input_ids=head, **clip, use_cache=True, logits_to_keep=1)[CACHE_NAME]
        pieces = model(input_ids=tail, **image, **{CACHE_NAME: cache}, use_cache=True).logits
        whole = model(input_ids=torch.cat([head, tail], 1), **clip, **image, use_cache=True).logits
    torch.testing.assert_close(pieces, whole[:, head.shape[1] :], rtol=0, atol=1e-4)
