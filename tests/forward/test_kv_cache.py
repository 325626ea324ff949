"""The cache: rows of their own length, growth, beams, copies, and failure without a trace."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mminfer import AIMPrune, InferenceConfig, InputError, LookM, patched
from mminfer.forward.kv_cache import CompressedCache, Continuation
from mminfer.forward.kv_layer import PaddedLayer
from mminfer.technique import CacheEntries
from tests.tiny import IMAGE, tiny_inputs, tiny_model


def entries(length: int, tracked: bool = True) -> CacheEntries:
    k, v = torch.randn(2, 1, 2, length, 8)
    if not tracked:
        return CacheEntries(k, v)
    return CacheEntries(k, v, torch.rand(1, 2, length) > 0.5, torch.rand(1, 2, length))


def layer_of(rows: list[CacheEntries]) -> PaddedLayer:
    cache = CompressedCache()
    layer = PaddedLayer(rows, [len(r) for r in rows], cache)
    ends = torch.tensor([float(len(r)) for r in rows])
    cache.commit([layer], max(map(len, rows)), [len(r) for r in rows], Continuation.behind_text(ends))
    return layer


@given(st.lists(st.integers(1, 40), min_size=1, max_size=4), st.booleans(), st.integers(0, 90))
def test_rows_keep_what_was_put_in(lengths, tracked, steps):
    rows = [entries(n, tracked) for n in lengths]
    layer = layer_of(rows)
    assert layer.lengths == lengths
    assert layer.nbytes == 2 * sum(lengths) * 2 * 8 * 4
    new = torch.randn(steps, 2, len(lengths), 2, 1, 8)
    for k, v in new:
        layer.write_ahead(k, v)
        layer.advance(1)
    for b, before in enumerate(rows):
        after = layer.row(b)
        assert torch.equal(after.keys[:, :, : lengths[b]], before.keys)
        assert torch.equal(after.values[:, :, : lengths[b]], before.values)
        assert torch.equal(after.keys[0, :, lengths[b] :], new[:, 0, b].squeeze(2).transpose(0, 1))
        if tracked:
            assert torch.equal(after.is_visual[:, :, : lengths[b]], before.is_visual)
            assert not after.is_visual[:, :, lengths[b] :].any()
            assert torch.equal(after.score[:, :, : lengths[b]], before.score)


def test_growing_copies_rarely():
    layer = layer_of([entries(1000)])
    addresses = set()
    for _ in range(200):
        keys, _ = layer.write_ahead(*torch.randn(2, 1, 2, 1, 8))
        layer.advance(1)
        addresses.add(keys.data_ptr())
    assert len(addresses) <= 3


def test_columns_written_ahead_count_only_after_the_advance():
    layer = layer_of([entries(5), entries(3)])
    keys, _ = layer.write_ahead(*torch.randn(2, 2, 2, 1, 8))
    assert keys.shape[2] == 6
    assert layer.keys.shape[2] == 5
    assert layer.lengths == [5, 3]


def test_beams_reorder_rows():
    rows = [entries(5), entries(3)]
    layer = layer_of(rows)
    layer.cache.reorder_cache(torch.tensor([1, 1, 0]))
    assert layer.lengths == [3, 3, 5]
    assert layer.tokens_seen == (3, 3, 5)
    assert layer.cache.next_position.tolist() == [3, 3, 5]
    assert torch.equal(layer.row(1).keys, rows[1].keys)


def test_a_clone_is_independent():
    layer = layer_of([entries(4)])
    copy = layer.cache.clone()
    copy.layers[0].write_ahead(*torch.ones(2, 1, 2, 1, 8))
    copy.advance(1)
    copy.layers[0].keys.zero_()
    assert layer.lengths == [4]
    assert layer.keys.abs().sum() > 0
    assert copy.logical_length == layer.cache.logical_length + 1


def test_it_cannot_be_used_as_a_plain_cache():
    layer = layer_of([entries(4)])
    with pytest.raises(InputError, match="compressed"):
        layer.update(*torch.ones(2, 1, 2, 1, 8))
    with pytest.raises(InputError, match="rolled back"):
        layer.cache.crop(-1)


@pytest.mark.parametrize("fails_at", [0, 2, 3])
@pytest.mark.parametrize("new_tokens", [1, 5])
def test_a_failed_call_leaves_the_cache_as_it_was(fails_at, new_tokens):
    model = tiny_model("internvl")
    inputs = tiny_inputs("internvl", [[3, IMAGE, 4]])
    with patched(model, InferenceConfig(prune=AIMPrune(1, 3), cache=LookM(0.2, 0.1))):
        cache = model(**inputs, use_cache=True).past_key_values
        restore = cache.snapshot()
        before = [(layer.row(0).keys.clone(), layer.lengths, layer.tokens_seen) for layer in cache.layers]
        ids = torch.full((1, new_tokens), 20)
        want = model(input_ids=ids, past_key_values=cache.clone()).logits

        def fail(*args):
            raise RuntimeError("no memory")

        hook = model.base_model.language_model.layers[fails_at].mlp.register_forward_hook(fail)
        with pytest.raises(RuntimeError, match="no memory"):
            model(input_ids=ids, past_key_values=cache)
        hook.remove()
        assert model.config.get_text_config()._attn_implementation == "sdpa"
        assert cache.logical_length == inputs["input_ids"].shape[1]
        for layer, (keys, lengths, seen) in zip(cache.layers, before, strict=True):
            assert torch.equal(layer.row(0).keys, keys)
            assert (layer.lengths, layer.tokens_seen) == (lengths, seen)
        assert torch.equal(model(input_ids=ids, past_key_values=cache).logits, want)
        restore()
        assert torch.equal(model(input_ids=ids, past_key_values=cache).logits, want)
