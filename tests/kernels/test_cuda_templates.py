"""The bodies of the CUDA kernels, run by emulated thread blocks on the CPU through the ops' own Python code."""

import ctypes
import math
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mminfer_kernels import cuda
from mminfer_kernels.decode_attention import cuda_kernel as decode
from mminfer_kernels.decode_attention import reference as decode_reference
from mminfer_kernels.merge_rows import cuda_kernel as merge
from mminfer_kernels.merge_rows import reference as merge_reference

from tests.kernels.test_packed_decode_attention import dense as packed_dense
from tests.kernels.test_packed_decode_attention import packed

ROOT = Path(__file__).parents[2]
EMULATED = Path(__file__).parent / "emulated"
COMPILER = shutil.which("g++") or shutil.which("c++") or shutil.which("clang++")
FLOORS = {torch.float32: 1e-6, torch.bfloat16: 1e-3, torch.float16: 1e-4}


class Emulator:
    """Stands in for `cuda.launch`: compiles the body of the kernel for the CPU, under the same macros, and runs it."""

    def __init__(self, folder, include=ROOT / "csrc" / "include"):
        self.folder, self.include = folder, include
        self.launched = []
        self._loaded = {}

    def __call__(self, variant, grid, arguments, device):
        self.launched.append((variant.source, grid))
        run = self._loaded.get(variant)
        if run is None:
            run = self._loaded[variant] = self._compile(variant)
        fault = run((ctypes.c_longlong * 3)(*grid), ctypes.byref(arguments))
        assert fault is None, fault.decode()

    def _compile(self, variant):
        library = self.folder / f"{variant.kernel}.so"
        options = ["-std=c++17", "-O1", "-Wno-unknown-pragmas", "-shared", "-fPIC", f"-I{self.include}"]
        source = EMULATED / f"{variant.source}.cpp"
        subprocess.run([COMPILER, *options, *variant.defines, str(source), "-o", str(library)], check=True)
        run = ctypes.CDLL(str(library)).run
        run.restype = ctypes.c_char_p
        return run


@pytest.fixture(scope="module")
def compiled_so_far(tmp_path_factory):
    if COMPILER is None:
        pytest.skip("no C++ compiler")
    return Emulator(tmp_path_factory.mktemp("emulated"))


@pytest.fixture
def emulator(compiled_so_far, monkeypatch):
    monkeypatch.setattr(cuda, "launch", compiled_so_far)
    monkeypatch.setattr(cuda, "multiprocessors", lambda device: 6)
    compiled_so_far.launched.clear()
    return compiled_so_far


def close(found, reference, truth, dtype):
    """flash-attention's rule: at most twice the error of the reference in the kernel's dtype, and a floor."""
    error, usual = ((x.double() - truth).abs().max().item() for x in (found, reference))
    return error <= 2 * usual + FLOORS[dtype] * max(1.0, truth.abs().max().item())


def dense(q, k, v, starts, scale):
    """Attention in float64; rows without keys give zeros."""
    queries, entries = q.shape[2], k.shape[2]
    k, v = (x.double().repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    logits = q.double() @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    place = torch.arange(entries)
    hidden = place > torch.arange(entries - queries, entries)[:, None]
    if starts is not None:
        hidden = hidden | (place < starts[:, None])[:, None, None]
    return logits.masked_fill(hidden, -math.inf).softmax(-1).nan_to_num() @ v.double()


def framed(*shape, dtype):
    """Random numbers in the middle of NaNs, rows not next to one another, so that a stray read shows."""
    whole = torch.full((*shape[:-2], shape[-2] + 3, shape[-1] + 16), math.nan, dtype=dtype)
    inner = whole[..., 1 : 1 + shape[-2], 8 : 8 + shape[-1]]
    return inner.copy_(torch.randn(shape))


def check_decode(dtype, batch, groups, repeat, queries, entries, size, starts, scale=None):
    q = torch.randn(batch, groups * repeat, queries, size).to(dtype)
    k, v = (framed(batch, groups, entries, size, dtype=dtype) for _ in range(2))
    found = decode.decode_attention(q, k, v, starts, scale)
    assert found.dtype == dtype and found.shape == q.shape and found.is_contiguous()
    wanted = dense(q, k, v, starts, scale)
    assert close(found, decode_reference.decode_attention(q, k, v, starts, scale), wanted, dtype)


SHARED_EMULATOR = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
ROWS = [  # dtype, query heads of a group, new tokens: each number of rows is another kernel to compile
    (torch.float32, 1, 1),
    (torch.float32, 1, 3),
    (torch.float32, 5, 3),
    (torch.bfloat16, 1, 1),
    (torch.bfloat16, 7, 1),
    (torch.float16, 2, 2),
]


@pytest.mark.slow
@settings(SHARED_EMULATOR, max_examples=150)
@given(
    kind=st.sampled_from(ROWS),
    groups=st.integers(1, 2),
    entries=st.one_of(st.integers(1, 40), st.integers(125, 400)),
    size=st.sampled_from([1, 16, 24, 63, 64]),
    seed=st.integers(0, 999),
)
def test_decode_attention(emulator, kind, groups, entries, size, seed):
    torch.manual_seed(seed)
    (dtype, repeat, queries), batch = kind, 1 + seed % 2
    entries = max(entries, queries)
    starts = torch.randint(0, entries - queries + 1, (batch,)) if seed % 4 else None
    check_decode(dtype, batch, groups, repeat, queries, entries, size, starts, 0.3 if seed % 5 == 0 else None)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "size"),
    [
        (torch.bfloat16, 96),
        (torch.float16, 128),
        (torch.float32, 130),
        (torch.bfloat16, 256),
        (torch.float32, 300),
        (torch.float16, 512),
    ],
)
def test_larger_heads(emulator, dtype, size):
    check_decode(dtype, 2, 2, 4, 1, 700, size, torch.tensor([0, 333], dtype=torch.int32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_logits_far_apart(emulator, dtype):
    """The maximum of a stream grows late and by much, and no weight overflows on the way."""
    q, k, v = (
        torch.ones(1, 4, 1, 64),
        torch.linspace(-9, 9, 400)[:, None].expand(1, 1, 400, 64),
        torch.randn(1, 1, 400, 64),
    )
    q, k, v = (x.to(dtype) for x in (q, k, v))
    found, wanted = decode.decode_attention(q, k, v, None, 1.0), dense(q, k, v, None, 1.0)
    assert close(found, decode_reference.decode_attention(q, k, v, None, 1.0), wanted, dtype)


def test_splits_and_what_they_are_made_of(emulator):
    q, k = torch.randn(1, 4, 1, 64), torch.randn(1, 2, 2000, 64)
    found = decode.decode_attention(q, k, k, None, None)
    assert emulator.launched == [("decode_attention", (15, 2, 1)), ("decode_attention_combine", (4, 1, 1))]
    emulator.launched.clear()
    assert decode.decode_attention(q, k[:, :, :128], k[:, :, :128], None, None).isfinite().all()
    assert emulator.launched == [("decode_attention", (1, 2, 1))]
    torch.testing.assert_close(found, decode_reference.decode_attention(q, k, k, None, None))
    assert [decode.split_count(8, n, 400) for n in (1, 128, 129, 10**6)] == [1, 1, 2, 50]
    assert decode.split_count(1, 10**6, 10**6) == 128 and decode.split_count(900, 10**6, 400) == 1


def test_entries_before_a_row_starts_are_not_read(emulator):
    q, k, v = torch.randn(2, 4, 1, 64), torch.randn(2, 2, 600, 64), torch.randn(2, 2, 600, 64)
    starts = torch.tensor([590, 0])
    wanted = decode_reference.decode_attention(q, k, v, starts, None)
    k[0, :, :590], v[0, :, :590] = math.nan, math.nan
    torch.testing.assert_close(decode.decode_attention(q, k, v, starts, None), wanted)


def test_starts_outside_the_cache_are_the_nearest_within(emulator):
    q, k = torch.randn(2, 4, 1, 64), torch.randn(2, 2, 600, 64)
    found = decode.decode_attention(q, k, k, torch.tensor([600, -3]), None)
    assert torch.equal(found, decode.decode_attention(q, k, k, torch.tensor([599, 0]), None))
    assert decode.decode_attention(q[:0], k[:0], k[:0], None, None).shape == (0, 4, 1, 64)


def test_any_layout(emulator):
    q = torch.randn(2, 3, 4, 64).transpose(1, 2)
    k, v = torch.randn(2, 90, 2, 64).transpose(1, 2), torch.randn(2, 2, 64, 90).mT
    found = decode.decode_attention(q, k, v, None, None)
    torch.testing.assert_close(found, decode_reference.decode_attention(q, k, v, None, None))


def test_what_the_kernels_cannot_take_is_named(emulator):
    q = torch.randn(1, 2, 1, 600)
    with pytest.raises(ValueError, match="heads of 600"):
        decode.decode_attention(q, q, q, None, None)
    with pytest.raises(ValueError, match="wanted one dtype"):
        decode.decode_attention(q, q.half(), q, None, None)


@pytest.mark.parametrize(("dtype", "size", "repeat"), [(torch.bfloat16, 64, 7), (torch.float32, 33, 2)])
@pytest.mark.parametrize("massed", [True, False])
def test_packed_decode_attention(emulator, massed, dtype, size, repeat):
    """Heads of all lengths in disorder, NaN between them; some have fewer splits than the longest."""
    q, keys, values, first, lengths = packed([[1, 700], [129, 64]], size, dtype, heads=2 * repeat)
    log_mass = 3 * torch.rand(len(keys)) if massed else None
    wanted = packed_dense(q, keys, values, first, lengths, 0.3, log_mass)
    usual = decode_reference.packed_decode_attention(q, keys, values, first, lengths, 0.3, log_mass, None)
    for longest in (None, 10**6):
        found = decode.packed_decode_attention(q, keys, values, first, lengths, 0.3, log_mass, longest)
        assert found.dtype == dtype and found.shape == q.shape and found.is_contiguous()
        assert close(found, usual, wanted, dtype)
    assert emulator.launched[:2] == [
        ("packed_decode_attention", (6, 2, 2)),
        ("decode_attention_combine", (4 * repeat, 1, 1)),
    ]


@pytest.mark.parametrize("wrong", [(-1, 5), (0, 0), (600, 101), (0, 2**40), (2**63 - 1, 2**63 - 1), (0, 513)])
def test_a_head_whose_rows_are_not_there_is_not_a_number(emulator, wrong):
    q, keys = torch.randn(1, 4, 1, 33), torch.randn(700, 33)
    first, lengths = torch.tensor([[3, wrong[0]]]), torch.tensor([[400, wrong[1]]])
    found = decode.packed_decode_attention(q, keys, keys, first, lengths, None, None, 400)
    alone = decode.packed_decode_attention(q[:, :2], keys, keys, first[:, :1], lengths[:, :1], None, None, None)
    torch.testing.assert_close(found[:, :2], alone)
    assert found[:, 2:].isnan().all()


def test_splits_of_packed_caches_are_sized_by_all_rows():
    assert decode.packed_splits(1000, 900, 400) == (8, 128)
    assert decode.packed_splits(400 * 128 + 1, 50_000, 400) == (196, 256)
    assert decode.packed_splits(10**6, 10, 400) == (1, 2560)


def check_merge(dtype, batch, targets, sources, size, weighted, contiguous=True):
    dst, src = torch.randn(*batch, targets, size).to(dtype), torch.randn(*batch, sources, size).to(dtype)
    if not contiguous:
        dst, src = framed(*batch, targets, size, dtype=dtype), framed(*batch, sources, size, dtype=dtype)
    index = torch.randint(targets, (*batch, sources))
    weights = (torch.rand(*batch, targets) + 0.1, torch.rand(*batch, sources)) if weighted else (None, None)
    found, weight = merge.merge_rows(dst, src, index, *weights)
    assert found.dtype == dtype and found.is_contiguous() and weight.dtype == torch.float32
    wanted, wanted_weight = merge_reference.merge_rows(dst.double(), src.double(), index, *weights)
    usual, usual_weight = merge_reference.merge_rows(dst, src, index, *weights)
    assert close(found, usual, wanted, dtype)
    assert close(weight, usual_weight, wanted_weight, torch.float32)


@pytest.mark.slow
@settings(SHARED_EMULATOR, max_examples=200)
@given(
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    batch=st.sampled_from([(), (2,), (2, 3)]),
    targets=st.integers(1, 20),
    sources=st.integers(0, 40),
    size=st.sampled_from([1, 8, 24, 65, 128]),
    weighted=st.booleans(),
    contiguous=st.booleans(),
    seed=st.integers(0, 999),
)
def test_merge_rows(emulator, dtype, batch, targets, sources, size, weighted, contiguous, seed):
    torch.manual_seed(seed)
    check_merge(dtype, batch, targets, sources, size, weighted, contiguous)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_number_is_stored_as_it_was_loaded(emulator, dtype):
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype).view(64, 1024)
    merged, _ = merge.merge_rows(every, every[:0], torch.zeros(0, dtype=torch.int64), None, None)
    assert torch.equal(merged.nan_to_num(1.0), every.nan_to_num(1.0)) and torch.equal(merged.isnan(), every.isnan())


def test_rows_longer_than_a_block(emulator):
    check_merge(torch.bfloat16, (2,), 5, 30, 1500, True)
    assert emulator.launched == [("merge_rows", (10, 2, 1))]


def test_one_destination_of_many_and_mixed_dtypes(emulator):
    check_merge(torch.float16, (), 1, 1000, 64, True)
    dst, src, index = torch.randn(4, 16).bfloat16(), torch.randn(9, 16), torch.randint(4, (9,))
    found, wanted = (m.merge_rows(dst, src, index, None, None) for m in (merge, merge_reference))
    assert found[0].dtype == torch.bfloat16
    torch.testing.assert_close(found, wanted)


def test_rows_without_elements(emulator):
    index = torch.tensor([0, 1, 1])
    merged, weight = merge.merge_rows(torch.empty(2, 0), torch.empty(3, 0), index, None, None)
    assert merged.shape == (2, 0) and weight.tolist() == [2, 3]


def test_sums_are_taken_in_the_order_of_the_sources(emulator):
    dst, src, index = torch.randn(3, 40), torch.randn(500, 40), torch.randint(3, (500,))
    found, wanted = (m.merge_rows(dst, src, index, None, None) for m in (merge, merge_reference))
    assert torch.equal(found[0], wanted[0]) and torch.equal(found[1], wanted[1])


def test_sources_keep_their_order_within_a_destination():
    order, bounds = merge.segments(torch.tensor([2, 0, 2, 2, 0]), 4)
    assert order.tolist() == [1, 4, 0, 2, 3] and bounds.tolist() == [0, 2, 2, 5, 5]


BARRIERS = {
    "after the weights": ("b_.any_in_warp(grew_);\n    b_.sync_warp();", "b_.any_in_warp(grew_);", "a read"),
    "after the values": ("    });\n    b_.sync_warp();\n  }", "    });\n  }", "a write"),
    "before the output": ("put_sums(thread); });\n    b_.sync();", "put_sums(thread); });", "a read"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", BARRIERS)
def test_a_missing_barrier_is_found(compiled_so_far, name, tmp_path, monkeypatch):
    shutil.copytree(ROOT / "csrc" / "include", tmp_path / "include")
    header = tmp_path / "include" / "mminfer" / "decode_attention_block.h"
    whole, cut, message = BARRIERS[name]
    text = header.read_text("utf-8")
    assert text.count(whole) == 1 or name == "after the values"
    before, _, after = text.rpartition(whole)
    header.write_text(before + cut + after, "utf-8")
    monkeypatch.setattr(cuda, "launch", Emulator(tmp_path, tmp_path / "include"))
    monkeypatch.setattr(cuda, "multiprocessors", lambda device: 1)
    q, k = torch.randn(1, 1, 1, 64), torch.randn(1, 1, 200, 64)
    with pytest.raises(AssertionError, match=message):
        decode.decode_attention(q, k, k, None, None)
