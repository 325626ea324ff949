"""The CUDA kernels compile without a GPU, keep to registers, and are launched with the right arguments."""

import contextlib
import ctypes
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mminfer_kernels import cuda
from mminfer_kernels.decode_attention import cuda_kernel as decode
from mminfer_kernels.merge_rows import cuda_kernel as merge

ROOT = Path(__file__).parents[2]
needs_nvrtc = pytest.mark.skipif(not cuda.has_compiler(), reason="no NVRTC: torch without CUDA")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MMINFER_CACHE", str(tmp_path))
    cuda.cubin_of.cache_clear()
    return tmp_path / "cuda"


def resources(cubin, folder):
    """Registers, stack and memory of the only kernel, as cuobjdump reads them from the machine code."""
    triton = pytest.importorskip("triton", reason="cuobjdump comes with triton")
    file = folder / "kernel.cubin"
    file.write_bytes(cubin)
    command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(file)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", text)}


@pytest.mark.slow
@needs_nvrtc
@pytest.mark.parametrize("arch", [80, 90])
def test_nothing_spills(arch, cache, tmp_path):
    kernels = cuda.compile_kernels(arch)
    variants = {v.kernel: v for module in (decode, merge) for v in module.usual_variants()}
    assert [kernel.kernel for kernel in kernels] == list(variants) and len(kernels) > 15
    reserved = 1024 if arch >= 90 else 0
    for kernel in kernels:
        found, variant = resources(kernel.cubin, tmp_path), variants[kernel.kernel]
        assert found["STACK"] == found["LOCAL"] == 0, (kernel.kernel, found)
        assert found["REG"] <= 65536 // (variant.threads * variant.blocks) // 8 * 8, (kernel.kernel, found)
        assert found["SHARED"] == kernel.shared_bytes <= 48 * 1024
        assert variant.blocks * (kernel.shared_bytes + reserved) <= 164 * 1024
        assert kernel.threads == 128 and kernel.op in cuda.OPS and kernel.dtype in str(list(cuda.SCALARS))


@needs_nvrtc
def test_the_cache_is_read_and_knows_its_sources(cache, monkeypatch):
    variant = merge.usual_variants()[0]
    cubin = cuda.cubin_of(variant, 80)
    (file,) = cache.iterdir()
    assert file.name.startswith("merge_rows_float_aligned-sm_80-") and file.read_bytes() == cubin
    file.write_bytes(b"kept")
    cuda.cubin_of.cache_clear()
    assert cuda.cubin_of(variant, 80) == b"kept"
    copy = cache.parent / "csrc"
    shutil.copytree(cuda.sources(), copy)
    with (copy / "include" / "mminfer" / "scalar.h").open("a") as header:
        header.write("// another line\n")
    monkeypatch.setattr(cuda, "sources", lambda: copy)
    cuda.cubin_of.cache_clear()
    assert cuda.cubin_of(variant, 80) != b"kept" and len(list(cache.iterdir())) == 2


@needs_nvrtc
def test_a_folder_that_cannot_be_written_to_is_no_cache(cache, monkeypatch):
    cache.write_text("a file, no folder")
    assert cuda.cubin_of(merge.usual_variants()[0], 80)


@needs_nvrtc
def test_a_refused_source_shows_the_compilers_log(cache):
    variant = cuda.Variant("merge_rows", "merge_rows", 128, 8, (("SCALAR", "Nonsense"), ("ALIGNED", True)))
    with pytest.raises(cuda.CompileError, match=r"merge_rows_nonsense_aligned: (?s:.*)Nonsense"):
        cuda.cubin_of(variant, 80)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
@pytest.mark.parametrize(
    "source", ["decode_attention", "packed_decode_attention", "decode_attention_combine", "merge_rows"]
)
def test_nvcc_takes_the_sources_too(source, tmp_path):
    variant = next(v for module in (decode, merge) for v in module.usual_variants() if v.source == source)
    options = ["-cubin", "-arch=sm_80", "-std=c++17", f"-I{cuda.sources() / 'include'}", *variant.defines]
    files = [str(cuda.sources() / "cuda" / f"{source}.cu"), "-o", str(tmp_path / "kernel.cubin")]
    run = subprocess.run(["nvcc", *options, *files], capture_output=True, text=True, check=False)
    assert run.returncode == 0 and run.stderr == "", run.stderr


class Driver:
    """Stands in for `cuda.bindings.driver`; keeps what it was told."""

    def __init__(self, context=5, status=0):
        self.context, self.status = context, status
        self.calls, self.arguments = [], []

    def __getattr__(self, name):
        def call(*values):
            self.calls.append((name, values))
            answers = {
                "cuCtxGetCurrent": (0, self.context),
                "cuDeviceGet": (0, 1),
                "cuDevicePrimaryCtxRetain": (0, 6),
                "cuModuleLoadData": (0, "module"),
                "cuModuleGetFunction": (0, "function"),
                "cuLaunchKernel": (self.status,),
            }
            if name == "cuLaunchKernel":
                self.arguments.append(ctypes.c_void_p.from_address(values[9]).value)
            return answers.get(name, (0,))

        return call

    def named(self, name):
        return [values for called, values in self.calls if called == name]


@pytest.fixture
def launching(monkeypatch):
    """A function that puts a stand-in in the place of the driver and of torch's view of the GPU."""

    def use(driver):
        monkeypatch.setattr(cuda, "driver", lambda: driver)
        monkeypatch.setattr(cuda, "architecture", lambda device: 90)
        monkeypatch.setattr(cuda, "multiprocessors", lambda device: 132)
        monkeypatch.setattr(cuda, "cubin_of", lambda variant, arch: f"{variant.kernel} {arch}".encode())
        monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=77))
        cuda._function.cache_clear()
        return driver

    yield use
    cuda._function.cache_clear()


def test_decode_attention_is_launched_with_what_it_was_given(launching):
    driver = launching(Driver())
    q, k = torch.randn(2, 28, 1, 128).bfloat16(), torch.randn(2, 1000, 4, 128).bfloat16().transpose(1, 2)
    output = decode.decode_attention(q, k, k, torch.tensor([3, 4]), None)
    kernels = ["decode_attention_bf16_128_7_aligned", "decode_attention_combine_bf16"]
    assert driver.named("cuModuleLoadData") == [(f"{name} 90".encode(),) for name in kernels]
    assert driver.named("cuModuleGetFunction") == [("module", name.encode()) for name in kernels]
    launches = driver.named("cuLaunchKernel")
    assert [x[:9] for x in launches] == [
        ("function", 8, 4, 2, 128, 1, 1, 0, 77),
        ("function", 56, 1, 1, 128, 1, 1, 0, 77),
    ]
    assert output.shape == q.shape


def test_the_arguments_are_pointers_strides_and_shapes(monkeypatch):
    seen = []
    monkeypatch.setattr(cuda, "launch", lambda variant, grid, arguments, device: seen.append(arguments))
    monkeypatch.setattr(cuda, "multiprocessors", lambda device: 132)
    q, k = torch.randn(2, 8, 1, 64), torch.randn(2, 100, 4, 64).transpose(1, 2)
    output = decode.decode_attention(q, k, k, None, 0.5)
    (a,) = seen
    assert (a.query, a.key, a.value, a.starts, a.output) == (
        q.data_ptr(),
        k.data_ptr(),
        k.data_ptr(),
        None,
        output.data_ptr(),
    )
    assert [list(x) for x in (a.query_strides, a.key_strides)] == [[512, 64, 0], [25600, 64, 256]]
    assert [a.heads, a.groups, a.queries, a.entries, a.size, a.splits] == [8, 4, 1, 100, 64, 1]
    assert a.factor == pytest.approx(0.5 * 1.4426950408889634)
    seen.clear()
    dst, src, weight = torch.randn(6, 20), torch.randn(9, 20), torch.rand(6)
    merged, _ = merge.merge_rows(dst, src, torch.zeros(9, dtype=torch.int64), weight, None)
    (a,) = seen
    assert (a.dst, a.src, a.merged) == (dst.data_ptr(), src.data_ptr(), merged.data_ptr())
    assert a.dst_weight == weight.data_ptr() and a.src_weight is None
    assert [list(a.dst_strides), a.targets, a.sources, a.size, a.rows, a.lanes] == [[0, 20], 6, 9, 20, 6, 8]


def test_a_kernel_is_loaded_once_and_given_its_only_argument_by_address(launching):
    driver = launching(Driver())
    variant, arguments = merge.usual_variants()[0], merge.Arguments(size=3)
    for _ in range(2):
        cuda.launch(variant, (1, 2, 3), arguments, 0)
    assert len(driver.named("cuModuleLoadData")) == 1
    assert driver.arguments == [ctypes.addressof(arguments)] * 2


def test_a_thread_without_a_context_gets_the_one_of_the_device(launching):
    driver = launching(Driver(context=0))
    cuda.launch(merge.usual_variants()[0], (1, 1, 1), merge.Arguments(), 1)
    assert driver.named("cuDeviceGet") == [(1,)] and driver.named("cuCtxSetCurrent") == [(6,)]


@pytest.mark.skipif(find_spec("cuda") is None, reason="no cuda.bindings")
def test_a_refused_launch_is_named(launching):
    from cuda.bindings.driver import CUresult

    launching(Driver(status=CUresult.CUDA_ERROR_ILLEGAL_ADDRESS))
    with pytest.raises(RuntimeError, match="CUDA_ERROR_ILLEGAL_ADDRESS"):
        cuda.launch(merge.usual_variants()[0], (1, 1, 1), merge.Arguments(), 0)


def test_wheels_hold_the_sources():
    packaged = ROOT / "kernels" / "mminfer_kernels" / "csrc"
    assert packaged.resolve() == ROOT / "csrc" == cuda.sources()
    assert '"csrc/**/*.cu"' in (ROOT / "pyproject.toml").read_text("utf-8")


@pytest.mark.slow
def test_importing_loads_no_compiler_and_touches_no_driver():
    program = """
import sys
import mminfer_kernels.decode_attention.cuda_kernel, mminfer_kernels.merge_rows.cuda_kernel, torch
from mminfer_kernels import cuda
print("cuda.bindings.nvrtc" in sys.modules, torch.cuda.is_initialized(), cuda.available())
"""
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT / "kernels", capture_output=True, text=True, check=True
    )
    assert run.stdout == f"False False {torch.cuda.is_available()}\n"


def test_traffic_is_the_least_where_nothing_is_read_twice():
    q, k = torch.empty(1, 8, 1, 128, dtype=torch.bfloat16), torch.empty(1, 1, 100, 128, dtype=torch.bfloat16)
    ends = 2 * 8 * 128 * 2
    assert decode.traffic(q, k) == (2 * 100 * 128 * 2 + ends, 2 * 100 * 128 * 2 + ends)
    assert decode.traffic(q, k, torch.tensor([40])) == (2 * 60 * 128 * 2 + ends + 8,) * 2
    twice = decode.traffic(q.expand(1, 8, 2, 128), k)
    assert twice.moved_bytes - twice.least_bytes == 2 * 100 * 128 * 2
    least, moved = decode.traffic(q, torch.empty(1, 1, 32768, 128, dtype=torch.bfloat16))
    assert least < moved < 1.07 * least


def test_traffic_of_merging_is_mostly_rows():
    dst, src = torch.empty(4, 1000, 896, dtype=torch.bfloat16), torch.empty(4, 3000, 896, dtype=torch.bfloat16)
    least, moved = merge.traffic(dst, src, weights=False)
    assert least == 4 * 896 * 2 * (2 * 1000 + 3000) + 4 * (8 * 3000 + 4 * 1000)
    assert least < moved < 1.05 * least
