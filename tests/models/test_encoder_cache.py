"""Encoded pictures that are kept: the same tensors, no tower pass, a bound, and nothing stale."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch

from mminfer import ConfigError, Engine, PatchDedup
from mminfer.models.encoder_cache import EncoderCache
from mminfer.models.encoding import HostEncoder
from mminfer.models.registry import adapter_for
from mminfer.nano import sample_messages
from tests.tiny import FAMILIES, IMAGE, VIDEO, tiny_inputs, tiny_model
from tests.tiny_models import llava_onevision_engine

ROOM = 2**24


def prompts(family):
    return [[3, IMAGE, 5, VIDEO if FAMILIES[family].video else IMAGE], [IMAGE, 4]]


@contextmanager
def counted(adapter):
    """Rows of pixels that go through the tower."""
    rows = []
    tower = adapter.tower.part(adapter.tower.module)
    handle = tower.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(args[0] if args else kwargs["pixel_values"])), with_kwargs=True
    )
    try:
        yield rows
    finally:
        handle.remove()


def same(one, other):
    for kind, units in one.units.items():
        for unit, own in zip(units, other.units[kind], strict=True):
            assert torch.equal(unit.features, own.features) and torch.equal(unit.size, own.size)
            assert (unit.companions is None) == (own.companions is None)
            assert unit.companions is None or torch.equal(unit.companions, own.companions)
    return True


@pytest.mark.parametrize("tower", [None, PatchDedup()])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_comes_again_is_the_same_tensor_without_a_pass(family, tower):
    adapter, inputs = adapter_for(tiny_model(family)), tiny_inputs(family, prompts(family))
    encoder = HostEncoder(adapter, tower, EncoderCache(ROOM))
    with counted(adapter) as rows:
        first = encoder.encode(inputs)
        passes = len(rows)
        again = encoder.encode(inputs)
    assert passes and len(rows) == passes and not again.calls
    assert same(HostEncoder(adapter, tower).encode(inputs), first) and same(first, again)
    assert first.hits == 0 and again.hits >= 3


@pytest.mark.parametrize("family", FAMILIES)
def test_of_a_batch_only_what_is_new_is_encoded(family):
    adapter = adapter_for(tiny_model(family))
    encoder, other = HostEncoder(adapter, None, EncoderCache(ROOM)), tiny_inputs(family, [[IMAGE, IMAGE, IMAGE]], 1)
    pixels = "pixel_values"
    encoder.encode(other)
    mixed = dict(other)
    mixed[pixels] = other[pixels].clone()
    if pixels in mixed and FAMILIES[family].padded:
        mixed[pixels][:, 2] += 1
    else:
        third = len(mixed[pixels]) // 3
        mixed[pixels][third : 2 * third] += 1
    with counted(adapter) as rows:
        found = encoder.encode(mixed)
    wanted = HostEncoder(adapter).encode(mixed)
    with counted(adapter) as all_rows:
        HostEncoder(adapter).encode(mixed)
    assert sum(rows) < sum(all_rows)
    for kind, units in wanted.units.items():
        for unit, own in zip(units, found.units[kind], strict=True):
            torch.testing.assert_close(own.features, unit.features, rtol=1e-4, atol=1e-5)


def test_a_picture_that_comes_twice_in_a_call_is_encoded_once():
    adapter, inputs = adapter_for(tiny_model("qwen2_vl")), tiny_inputs("qwen2_vl", [[IMAGE, IMAGE]])
    inputs["pixel_values"][96:] = inputs["pixel_values"][:96]
    with counted(adapter) as rows:
        found = HostEncoder(adapter, None, EncoderCache(ROOM)).encode(inputs)
    assert rows == [96] and found.hits == 1


def test_memory_is_bounded_and_the_oldest_goes_first():
    adapter = adapter_for(tiny_model("llava"))
    one, two, three = (tiny_inputs("llava", [[IMAGE]], seed) for seed in range(3))
    size = 16 * 64 * 4 + 16 * 4
    cache = EncoderCache(2 * size)
    encoder = HostEncoder(adapter, None, cache)
    for inputs in (one, two, one, three):
        encoder.encode(inputs)
    assert cache.held_bytes == 2 * size and len(cache) == 2 and (cache.hits, cache.misses) == (1, 3)
    assert encoder.encode(one).hits == 1 and encoder.encode(two).hits == 0
    own = [units[0].features for units, _ in cache._kept.values()]
    assert all(x.untyped_storage().nbytes() == x.numel() * 4 for x in own)  # no part of a larger call is held
    small = EncoderCache(size - 1)
    HostEncoder(adapter, None, small).encode(one)
    assert len(small) == small.held_bytes == 0
    cache.clear()
    assert len(cache) == cache.held_bytes == 0 and encoder.encode(one).hits == 0


def test_other_weights_other_pixels_and_other_settings_are_other_pictures():
    adapter, inputs = adapter_for(tiny_model("llava")), tiny_inputs("llava", [[IMAGE]])
    cache = EncoderCache(ROOM)
    encoder = HostEncoder(adapter, None, cache)
    before = encoder.encode(inputs)
    bias = adapter.base.multi_modal_projector.linear_2.bias
    with torch.no_grad():
        bias.add_(1.0)
    after = encoder.encode(inputs)
    with torch.no_grad():
        bias.sub_(1.0)
    assert after.hits == 0 and not same_units(before, after)
    assert encoder.encode(inputs).hits == 0 and encoder.encode(inputs).hits == 1
    assert HostEncoder(adapter, PatchDedup(), cache).encode(inputs).hits == 0
    other = {**inputs, "pixel_values": inputs["pixel_values"].clone()}
    other["pixel_values"][0, 2, -1, -1] += 1e-6
    assert encoder.encode(other).hits == 0


def test_weights_that_lie_where_others_lay_are_not_those():
    adapter, inputs = adapter_for(tiny_model("llava")), tiny_inputs("llava", [[IMAGE]])
    encoder, bias = HostEncoder(adapter, None, EncoderCache(ROOM)), adapter.base.multi_modal_projector.linear_2.bias
    before, memory = bias.data, bias.detach().clone().numpy()
    try:
        bias.data = torch.from_numpy(memory)
        encoder.encode(inputs)
        memory += 1  # given back, and taken by another tensor
        bias.data = torch.from_numpy(memory)
        found = encoder.encode(inputs)
        assert found.hits == 0 and same(HostEncoder(adapter).encode(inputs), found)
        assert encoder.encode(inputs).hits == 1
    finally:
        bias.data = before


def test_what_was_computed_otherwise_is_computed_again():
    adapter, inputs = adapter_for(tiny_model("llava")), tiny_inputs("llava", [[IMAGE]])
    encoder, plain = HostEncoder(adapter, None, EncoderCache(ROOM)), HostEncoder(adapter)
    encoder.encode(inputs)
    with torch.autocast("cpu", torch.bfloat16):
        assert same(plain.encode(inputs), encoder.encode(inputs))
    assert encoder.encode(inputs).hits == 1
    tower = adapter.base.vision_tower.train()
    try:
        assert encoder.encode(inputs).hits == 0  # there may be dropout
    finally:
        tower.eval()
    assert encoder.encode(inputs).hits == 0


def same_units(one, other):
    pairs = [pair for kind in one.units for pair in zip(one.units[kind], other.units[kind], strict=True)]
    return all(torch.equal(a.features, b.features) for a, b in pairs)


def test_threads_may_share_it():
    adapter = adapter_for(tiny_model("llava"))
    given = [tiny_inputs("llava", [[IMAGE]], seed) for seed in range(4)]
    wanted = [HostEncoder(adapter).encode(inputs) for inputs in given]
    cache = EncoderCache(2 * (16 * 64 * 4 + 16 * 4))
    encoder = HostEncoder(adapter, None, cache)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda n: (n % 4, encoder.encode(given[n % 4])), range(40)))
    assert all(same(wanted[n], one) for n, one in found)
    assert cache.held_bytes == sum(size for _, size in cache._kept.values()) <= cache.capacity_bytes


@pytest.mark.parametrize("capacity", [-1, 1.5, True, "8", None])
def test_a_capacity_that_is_none_is_refused(capacity):
    with pytest.raises(ConfigError, match="encoder_cache_bytes"):
        Engine.from_pretrained("nano", encoder_cache_bytes=capacity)


def test_an_engine_answers_the_same_and_says_what_it_kept():
    plain = Engine.from_pretrained("nano")
    engine, messages = Engine(plain.model, plain.processor, encoder_cache_bytes=ROOM), sample_messages()
    first, again = (engine.generate(messages, max_new_tokens=3, output_logits=True) for _ in range(2))
    wanted = plain.generate(messages, max_new_tokens=3, output_logits=True)
    assert torch.equal(first.logits, wanted.logits) and torch.equal(again.logits, wanted.logits)
    assert wanted.stats.vision_flops == first.stats.vision_flops == first.stats.full_vision_flops > 0
    assert again.stats.vision_flops == 0 and again.stats.full_vision_flops == first.stats.vision_flops
    pictures = sum(part["type"] == "image" for part in messages[0]["content"])
    assert (wanted.stats.encoder_cache_hits, first.stats.encoder_cache_hits) == (0, 0)
    assert again.stats.encoder_cache_hits == len(engine.encoder_cache) == pictures
    pieces = engine.generate(messages, max_new_tokens=3, prefill_chunk_size=64)
    assert pieces.text == wanted.text and pieces.stats.encoder_cache_hits == pictures
    chat = engine.chat(max_new_tokens=3)
    assert chat.send(messages[0]["content"]).stats.encoder_cache_hits == pictures
    both = engine.generate([messages] * 2, max_new_tokens=3, num_return_sequences=2, do_sample=True)
    assert [out.stats.vision_flops for out in both] == [0] * 4 and both[0].stats.encoder_cache_hits == 2 * pictures


def test_an_image_among_others_is_not_the_one_that_comes_alone():
    model, processor = llava_onevision_engine()
    plain, engine = Engine(model, processor), Engine(model, processor, encoder_cache_bytes=ROOM)
    picture = torch.randint(0, 256, (16, 32, 3), dtype=torch.uint8)
    other = torch.randint(0, 256, (16, 16, 3), dtype=torch.uint8)

    def asked(*images):
        return [{"role": "user", "content": [*({"type": "image", "image": x} for x in images), "What?"]}]

    for messages in (asked(picture), asked(picture, other), asked(other, picture), [*asked(picture)], asked(other)):
        wanted, found = (e.generate(messages, max_new_tokens=2, output_logits=True) for e in (plain, engine))
        torch.testing.assert_close(found.logits, wanted.logits, rtol=1e-4, atol=1e-5)
    assert engine.encoder_cache.hits > 0
