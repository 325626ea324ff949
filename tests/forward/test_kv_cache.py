"""The cache: rows of their own length, growth, beams, copies, and failure without a trace."""

import copy
import gc
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mminfer import AIMPrune, InferenceConfig, InputError, LookM, patched
from mminfer.forward.kv_cache import CompressedCache, Continuation
from mminfer.forward.kv_layer import CompressedLayer, PaddedLayer
from mminfer.forward.packed_layer import PackedLayer
from mminfer.technique import CacheEntries
from tests.tiny import IMAGE, tiny_inputs, tiny_model


def entries(length: int, tracked: bool = True) -> CacheEntries:
    k, v = torch.randn(2, 1, 2, length, 8)
    if not tracked:
        return CacheEntries(k, v)
    return CacheEntries(k, v, torch.rand(1, 2, length) > 0.5, torch.rand(1, 2, length))


def layer_of(rows: list[CacheEntries], headroom: int | None = None) -> PaddedLayer:
    cache = CompressedCache()
    cache.headroom = headroom
    layer = PaddedLayer(rows, [len(r) for r in rows], cache)
    ends = torch.tensor([float(len(r)) for r in rows])
    cache.commit([layer], max(map(len, rows)), [len(r) for r in rows], Continuation.behind_text(ends))
    layer.kept = cache  # which the layer alone does not keep alive
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


def uneven(lengths: list[int], weighed: bool) -> CacheEntries:
    """Packed, of heads of these lengths."""
    k, v = torch.randn(2, 1, 1, sum(lengths), 8)
    mass = torch.randn(1, 1, sum(lengths)) if weighed else None
    return CacheEntries(k, v, size=torch.rand(1, 1, sum(lengths)), log_mass=mass, head_lengths=tuple(lengths))


def packed_layer_of(rows: list[CacheEntries], headroom: int | None = 64) -> PackedLayer:
    cache = CompressedCache()
    cache.headroom = headroom
    layer = PackedLayer(rows, [99] * len(rows), cache)
    cache.commit([layer], 99, [99] * len(rows), Continuation.behind_text(torch.zeros(len(rows)).double()))
    layer.kept = cache  # which the layer alone does not keep alive
    return layer


def test_a_cache_goes_with_its_last_user_and_a_copy_has_layers_of_its_own():
    """No garbage collection is needed, which knows nothing of a GPU's memory."""
    model, inputs = tiny_model("llava"), tiny_inputs("llava", [[5], [3]])
    gc.collect()
    gc.disable()
    try:
        with patched(model, InferenceConfig()):
            cache = model(**inputs, use_cache=True).past_key_values
            twin = copy.deepcopy(cache)
            assert all(layer.cache is twin for layer in twin.layers)
            assert all(layer.cache is cache for layer in cache.layers)
            seen = weakref.ref(cache)
            want = model(input_ids=inputs["input_ids"][:, -1:], past_key_values=cache).logits
            del cache
            assert seen() is None
            assert torch.equal(model(input_ids=inputs["input_ids"][:, -1:], past_key_values=twin).logits, want)
            assert twin.get_seq_length() == 6
    finally:
        gc.enable()


@given(
    st.lists(st.lists(st.integers(0, 40), min_size=2, max_size=2).filter(any), min_size=1, max_size=3),
    st.booleans(),
    st.integers(0, 90),
    st.sampled_from([1, 7, 64]),
)
def test_heads_of_any_length_keep_what_was_put_in(lengths, weighed, steps, headroom):
    """Over growth, and back to where they were."""
    rows = [uneven(of_heads, weighed) for of_heads in lengths]
    layer = packed_layer_of(rows, headroom)
    restore, new = layer.cache.snapshot(), torch.randn(steps, 2, len(lengths), 2, 1, 8)
    for again in range(2):
        for k, v in new:
            layer.write_ahead(k, v)
            layer.cache.advance(1)
        assert layer.head_lengths == [tuple(n + steps for n in of_heads) for of_heads in lengths]
        assert layer.nbytes == sum(n + steps for one in lengths for n in one) * (2 * 8 * 4 + 4 * weighed)
        for b, before in enumerate(rows):
            after = layer.row(b)
            extended = before.extend(CacheEntries(*new[:, :, b].permute(1, 3, 2, 0, 4), size=torch.ones(1, 2, steps)))
            assert after.lengths == extended.lengths and (after.log_mass is not None) == weighed
            for name in ("keys", "values", "size", "log_mass"):
                ours, want = after.columns[name], extended.columns[name]
                assert (ours is None and want is None) or torch.equal(ours, want)
            more = layer.extended(b, entries(3, tracked=False)).keys
            assert more.shape[2] == after.total + 6
        if not again:
            restore()
            assert layer.head_lengths == [tuple(of_heads) for of_heads in lengths]


def test_spare_rows_are_few():
    """As many as a padded layer has spare columns; fewer where the heads are short."""
    for lengths, headroom, spare in (([1000, 3000], 64, 64), ([100, 20], 64, 32), ([1000, 3000], 500, 250)):
        layer = packed_layer_of([uneven(lengths, False)], headroom)
        assert layer.keys.shape[0] == sum(lengths) + 2 * spare


def test_growing_copies_rarely():
    layer = layer_of([entries(1000)])
    addresses = set()
    for _ in range(200):
        keys, _ = layer.write_ahead(*torch.randn(2, 1, 2, 1, 8))
        layer.advance(1)
        addresses.add(keys.data_ptr())
    assert len(addresses) <= 3


def used_bytes(layer: CompressedLayer) -> int:
    """Of every column of the entries that count, without padding."""
    columns = [x for b in range(layer.batch_size) for x in layer.row(b).columns.values() if x is not None]
    return sum(x.numel() * x.element_size() for x in columns)


@given(st.lists(st.integers(0, 900), min_size=2, max_size=4).filter(any), st.booleans(), st.integers(1, 200))
def test_a_layer_at_rest_has_hardly_any_spare_room(lengths, weighed, steps):
    """Made for no token to come, or settled behind some, however much room it was given for them."""
    for headroom in (None, 0, 300):
        layer = packed_layer_of([uneven(lengths, weighed)], headroom)
        assert headroom or used_bytes(layer) <= layer.allocated_bytes <= 1.01 * used_bytes(layer)
        for _ in range(steps):
            layer.write_ahead(*torch.randn(2, 1, len(lengths), 1, 8))
            layer.cache.advance(1)
        before = layer.row(0)
        layer.cache.settle()
        assert used_bytes(layer) <= layer.allocated_bytes <= 1.01 * used_bytes(layer)
        assert torch.equal(layer.row(0).keys, before.keys) and torch.equal(layer.row(0).size, before.size)


@pytest.mark.parametrize("length", [1, 100, 1000])
def test_a_layer_of_like_heads_at_rest_has_hardly_any_spare_room(length):
    layer = layer_of([entries(length)], 0)
    assert used_bytes(layer) <= layer.allocated_bytes <= 1.01 * used_bytes(layer)
    for _ in range(20):
        layer.write_ahead(*torch.randn(2, 1, 2, 1, 8))
        layer.advance(1)
    assert layer.allocated_bytes > 1.04 * used_bytes(layer)  # it grew, and will not have to soon
    before = layer.row(0).keys.clone()
    layer.settle()
    assert used_bytes(layer) <= layer.allocated_bytes <= 1.01 * used_bytes(layer)
    assert torch.equal(layer.row(0).keys, before)


@pytest.mark.parametrize("lengths", [[1, 3], [40, 200], [3000, 100]])
def test_decoding_from_rest_copies_each_entry_a_few_times(lengths):
    """So that a token costs no more the longer the answer gets."""
    layer, copied, address, steps = packed_layer_of([uneven(lengths, False)], None), 0, None, 1000
    for step in range(steps):
        keys = layer.write_ahead(*torch.zeros(2, 1, 2, 1, 8)).keys
        layer.cache.advance(1)
        copied += (sum(lengths) + 2 * step) * (keys.data_ptr() != address)
        address = keys.data_ptr()
    assert copied < 9 * (sum(lengths) + 2 * steps) + sum(lengths)


def test_columns_written_ahead_count_only_after_the_advance():
    layer = layer_of([entries(5), entries(3)])
    keys, _ = layer.write_ahead(*torch.randn(2, 2, 2, 1, 8))
    assert keys.shape[2] == 6
    assert layer.keys.shape[2] == 5
    assert layer.lengths == [5, 3]


def test_beams_reorder_rows_of_uneven_heads():
    rows = [uneven([5, 1], True), uneven([2, 9], True)]
    layer = packed_layer_of(rows)
    layer.write_ahead(*torch.randn(2, 2, 2, 1, 8))
    layer.cache.advance(1)
    before = [layer.row(b) for b in range(2)]
    layer.cache.reorder_cache(torch.tensor([1, 1, 0]))
    assert layer.head_lengths == [(3, 10), (3, 10), (6, 2)] and layer.batch_size == 3
    for b, of in enumerate((1, 1, 0)):
        assert torch.equal(layer.row(b).keys, before[of].keys)
    layer.write_ahead(*torch.ones(2, 3, 2, 1, 8))
    layer.cache.advance(1)
    assert all(bool((head.keys[:, :, -1] == 1).all()) for b in range(3) for head in layer.row(b).heads())


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
