"""The bodies of the CUDA kernels, run by emulated thread blocks on the CPU, their compilation, and their launch."""

import ctypes
import math
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mminfer_kernels import cuda
from mminfer_kernels.decode_attention import cuda_kernel as decode
from mminfer_kernels.decode_attention import reference as decode_reference
from mminfer_kernels.merge_rows import cuda_kernel as merge
from mminfer_kernels.merge_rows import reference as merge_reference

ROOT = Path(__file__).parents[2]
EMULATED = Path(__file__).parent / "emulated"
COMPILER = shutil.which("g++") or shutil.which("c++") or shutil.which("clang++")
FLOORS = {torch.float32: 1e-6, torch.bfloat16: 1e-3, torch.float16: 1e-4}


class Emulator:
    """Stands in for `cuda.launch`: compiles the body of the kernel for the CPU, under the same macros, and runs it."""

    def __init__(self, folder):
        self.folder = folder
        self.launched = []
        self._loaded = {}

    def __call__(self, variant, grid, arguments, device):
        self.launched.append((variant, grid, arguments))
        run = self._loaded.get(variant)
        if run is None:
            run = self._loaded[variant] = self._compile(variant)
        fault = run((ctypes.c_longlong * 3)(*grid), ctypes.byref(arguments))
        assert fault is None, fault.decode()

    def _compile(self, variant):
        library = self.folder / f"{variant.kernel}.so"
        options = ["-std=c++17", "-O1", "-Wno-unknown-pragmas", "-shared", "-fPIC", f"-I{ROOT / 'csrc' / 'include'}"]
        source = EMULATED / f"{variant.source}.cpp"
        subprocess.run([COMPILER, *options, *variant.defines, str(source), "-o", str(library)], check=True)
        run = ctypes.CDLL(str(library)).run
        run.restype = ctypes.c_char_p
        return run


@pytest.fixture(scope="module")
def emulator(tmp_path_factory):
    if COMPILER is None:
        pytest.skip("no C++ compiler")
    emulator = Emulator(tmp_path_factory.mktemp("emulated"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda, "launch", emulator)
        patch.setattr(cuda, "multiprocessors", lambda device: 6)
        yield emulator


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


@settings(deadline=None, max_examples=150)
@given(
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    rows=st.sampled_from([(1, 1), (4, 1), (1, 3), (7, 1), (2, 4), (5, 3)]),
    groups=st.integers(1, 2),
    entries=st.one_of(st.integers(1, 40), st.integers(250, 600)),
    size=st.sampled_from([1, 16, 24, 63, 64]),
    seed=st.integers(0, 999),
)
def test_decode_attention(emulator, dtype, rows, groups, entries, size, seed):
    torch.manual_seed(seed)
    (repeat, queries), batch = rows, 1 + seed % 3
    entries = max(entries, queries)
    starts = torch.randint(0, entries - queries + 1, (batch,)) if seed % 4 else None
    check_decode(dtype, batch, groups, repeat, queries, entries, size, starts, 0.3 if seed % 5 == 0 else None)
