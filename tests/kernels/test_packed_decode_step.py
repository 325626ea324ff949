"""The decode step over packed caches, in which every head has a length of its own, and over some of either kind."""

import copy
import importlib

import pytest
import torch
from mminfer_kernels import BackendError, LayerCache, PackedLayerCache, Segments, decode_step

from tests.kernels.agreement import assert_agrees
from tests.kernels.test_decode_step import HIDDEN, LAYERS, UNREAD, cast, tables, weights_of

ADDED, SPARE = 2, 3  # rows of a segment behind those that it was made with: used so far, and in all


@pytest.fixture(params=[1, 2])
def threads(request, monkeypatch):
    """Of the step, however small it is."""
    monkeypatch.setattr(importlib.import_module("mminfer_kernels.decode_step.native"), "SERIAL_BYTES", 0)
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def packed_cache(batch, groups, size, longest, massed, dtype=torch.float64):
    """Segments in disorder, of 0 entries to `longest`, and rows that belong to none; unread rows show."""
    lengths = torch.randint(longest + 1, (batch, groups))
    lengths.view(-1)[0], lengths.view(-1)[-1] = 0, longest
    first, rows = torch.zeros_like(lengths), 5
    for i in torch.randperm(batch * groups).tolist():
        first.view(-1)[i] = rows
        rows += int(lengths.view(-1)[i]) + SPARE
    keys, values = torch.full((2, rows + 5, size), UNREAD, dtype=dtype)
    log_mass = torch.full((rows + 5,), UNREAD) if massed else None
    for start, length in zip(first.flatten().tolist(), lengths.flatten().tolist(), strict=True):
        used = slice(start, start + length + ADDED)
        keys[used], values[used] = torch.randn(2, length + ADDED, size, dtype=dtype)
        if log_mass is not None:
            log_mass[used] = 3 * torch.rand(length + ADDED)
    return PackedLayerCache(keys, values, Segments(first, lengths, rows + 5), ADDED, log_mass)


def padded_cache(batch, groups, size, entries, dtype=torch.float64):
    keys, values = torch.randn(2, batch, groups, entries + 4, size, dtype=dtype)
    return LayerCache(keys, values, torch.arange(batch), entries)


def copied(caches, dtype):
    """The caches in memory of their own, keys and values in a dtype."""
    return [
        cache._replace(
            **{name: getattr(cache, name).to(dtype, copy=True) for name in ("keys", "values")},
            **({} if getattr(cache, "log_mass", None) is None else {"log_mass": cache.log_mass.clone()}),
        )
        for cache in caches
    ]


@pytest.mark.parametrize(
    ("heads", "groups", "size", "batch", "longest", "massed"),
    [
        (4, 4, 16, 1, 0, True), (6, 2, 80, 2, 130, False), (3, 1, 64, 1, 700, True), (6, 3, 96, 3, 300, True),
    ],
)  # fmt: skip
def test_native_is_as_right_as_pytorch_in_float32(isa, threads, heads, groups, size, batch, longest, massed):
    """Logits and caches follow the rule of `agreement`; one of the layers is padded."""
    weights = weights_of(heads, groups, size, True, True)
    caches = [packed_cache(batch, groups, size, longest, massed) for _ in range(LAYERS - 1)]
    caches.insert(1, padded_cache(batch, groups, size, longest))
    (cos, sin), x, results = tables(batch, size), torch.randn(batch, HIDDEN, dtype=torch.float64), []
    for dtype, backend in ((torch.float32, "native"), (torch.float32, "reference"), (torch.float64, "reference")):
        held, (cast_weights, _) = copied(caches, dtype), cast(weights, [], dtype)
        logits = decode_step(x.to(dtype), cos.to(dtype), sin.to(dtype), cast_weights, held, backend=backend)
        results.append((logits, [written(cache) for cache in held]))
        for cache, before in zip(held, copied(caches, dtype), strict=True):
            assert_rest_is_as_before(cache, before)
    assert_agrees(*results)


def new_rows(cache):
    return cache.segments.first + cache.segments.lengths + cache.added


def written(cache):
    if isinstance(cache, LayerCache):
        return cache.keys[:, :, cache.end], cache.values[:, :, cache.end]
    return cache.keys[new_rows(cache)], cache.values[new_rows(cache)]


def assert_rest_is_as_before(cache, before):
    """Only the new entries were written, with a log_mass of 0."""
    if isinstance(cache, LayerCache):
        return
    rows = new_rows(cache)
    for now, then in zip((cache.keys, cache.values), (before.keys, before.values), strict=True):
        assert (now[rows] != UNREAD).all()
        now = now.clone()
        now[rows] = UNREAD
        assert torch.equal(now, then)
    if cache.log_mass is not None:
        assert (cache.log_mass[rows] == 0).all()
        log_mass = cache.log_mass.clone()
        log_mass[rows] = UNREAD
        assert torch.equal(log_mass, before.log_mass)


def small(**change):
    """Arguments of a step whose last cache may be changed."""
    weights, _ = cast(weights_of(2, 1, 16, True, True), [], torch.float32)
    caches = copied([packed_cache(2, 1, 16, 20, True) for _ in range(LAYERS)], torch.float32)
    caches[-1] = caches[-1]._replace(**change)
    cos, sin = tables(2, 16, torch.float32)
    return {
        "hidden_states": torch.randn(2, HIDDEN), "cos": cos, "sin": sin, "weights": weights, "caches": caches,
    }  # fmt: skip


def test_equals_the_padded_step(native):
    """Heads of one length, packed one behind the other, are a padded cache."""
    weights, _ = cast(weights_of(6, 2, 32, False, False), [], torch.float32)
    padded = [padded_cache(2, 2, 32, 60, torch.float32)._replace(starts=None) for _ in range(LAYERS)]
    segments = Segments(64 * torch.arange(4).view(2, 2), torch.full((2, 2), 55), 256)
    packed = [PackedLayerCache(x.keys.clone().view(-1, 32), x.values.clone().view(-1, 32), segments, 5) for x in padded]
    inputs = torch.randn(2, HIDDEN), *tables(2, 32, torch.float32), weights
    assert torch.equal(decode_step(*inputs, padded), decode_step(*inputs, packed))
    for x, y in zip(padded, packed, strict=True):
        assert torch.equal(x.keys.view(-1, 32), y.keys) and torch.equal(x.values.view(-1, 32), y.values)


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_what_does_not_fit_is_named_before_anything_is_written(native, backend):
    cache = small()["caches"][-1]
    rows, places = len(cache.keys), torch.arange(4).view(2, 2)
    wrong = {
        "room for one more of 3": {"added": SPARE},
        "-1 rows added": {"added": -1},
        "True rows added": {"added": True},
        "segments is": {"segments": None},
        r"segments of \[2, 2\]": {"segments": Segments(5 * places, torch.ones_like(places), rows)},
        "wanted twice": {"values": cache.values[1:]},
        "wanted torch.float32": {"keys": cache.keys.double(), "values": cache.values.double()},
        "wanted tensors": {"keys": 3},
        "log_mass is": {"log_mass": torch.zeros(rows - 1)},
        r"wanted float32 \[": {"log_mass": torch.zeros(rows).half()},
    }
    for message, change in wrong.items():
        arguments = small(**change)
        held = [(cache.keys, cache.keys.clone()) for cache in arguments["caches"][:-1]]
        with pytest.raises(ValueError, match=message):
            decode_step(**arguments, backend=backend)
        assert all(torch.equal(now, then) for now, then in held)


def test_what_was_checked_stays_what_is_read(native):
    first, lengths = torch.tensor([[10, 0]]), torch.tensor([[4, 7]])
    segments = Segments(first, lengths, 20)
    assert segments.room == 3  # rows 7 to 9
    first.fill_(1000), lengths.fill_(1000)
    assert segments.first.tolist() == [[10, 0]] and segments.lengths.tolist() == [[4, 7]]
    arguments = small()
    wanted = decode_step(**arguments | {"caches": copied(arguments["caches"], torch.float32)}, backend="native")
    arguments["caches"][0].segments.lengths.fill_(10**9)
    assert torch.equal(decode_step(**arguments, backend="native"), wanted)


def test_a_copy_stands_for_itself(native):
    """Nothing of it lies in the memory of what it is a copy of."""
    arguments = small()
    wanted = decode_step(**arguments, backend="native")
    copies = [copy.deepcopy(cache.segments) for cache in arguments["caches"]]
    for cache, segments in zip(arguments["caches"], copies, strict=True):
        assert set(cache.segments.pointers).isdisjoint(segments.pointers) and segments.room == cache.segments.room
    caches = [cache._replace(segments=x) for cache, x in zip(arguments["caches"], copies, strict=True)]
    assert torch.equal(decode_step(**arguments | {"caches": caches}, backend="native"), wanted)


@pytest.mark.parametrize(
    ("first", "lengths", "rows", "message"),
    [
        ([[0, 4]], [[5, 1]], 20, "begins at row 0 and the next one at row 4, wanted no overlap"),
        ([[0, 4]], [[1, 17]], 20, "a segment of 17 rows begins at row 4"),
        ([[-1, 4]], [[1, 1]], 20, "begins at row -1"),
        ([[0, 4]], [[1, -1]], 20, "a segment of -1 rows"),
        ([[0, 4]], [[1, 1]], -1, "rows is -1"),
        ([0, 4], [1, 1], 20, r"wanted twice \[B, G\]"),
        ([[0.0, 4.0]], [[1, 1]], 20, "wanted int64"),
    ],
)
def test_wrong_segments_are_named(first, lengths, rows, message):
    with pytest.raises(ValueError, match=message):
        Segments(torch.tensor(first), torch.tensor(lengths), rows)
    with pytest.raises(ValueError, match="wanted a dense tensor"):
        Segments(first, lengths, rows)


def test_no_room_between_two_segments(native):
    """Segments that touch are no mistake until something is to be added."""
    segments = Segments(torch.tensor([[0], [5]]), torch.tensor([[5], [5]]), 20)
    arguments = small(keys=torch.randn(20, 16), values=torch.randn(20, 16), segments=segments, added=0, log_mass=None)
    with pytest.raises(ValueError, match="0 rows added, wanted room for one more of 0"):
        decode_step(**arguments)


def test_other_caches_are_a_type_error():
    arguments = small()
    arguments["caches"][1] = tuple(arguments["caches"][1])
    with pytest.raises(TypeError, match="cache 1 is tuple, wanted LayerCache or PackedLayerCache"):
        decode_step(**arguments)


def test_the_native_step_refuses_what_it_cannot_read(native):
    by_columns = small()["caches"][-1].keys.t().contiguous().t()
    arguments = small(keys=by_columns)
    with pytest.raises(BackendError, match="contiguous"):
        decode_step(**arguments, backend="native")
