"""The hand-written CUDA kernels: compiled by NVRTC, which torch brings, one instance of a template at a time.

Nothing here touches a driver before the first launch, and compiling needs neither a GPU nor CUDA's headers.
"""

import ctypes
import functools
import hashlib
import importlib
import logging
import os
import struct
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch

from mminfer_kernels.build import cache_folder, check_private, sources
from mminfer_kernels.launching import checked_grid

logger = logging.getLogger(__name__)

OLDEST_ARCH = 80  # bfloat16 conversions
LARGEST_HEAD = 512  # of decode attention: elements that a warp keeps in registers
SCALARS = {torch.float32: "float", torch.bfloat16: "Bf16", torch.float16: "Fp16"}
OPS = ("decode_attention", "merge_rows")


@dataclass(frozen=True)
class Variant:
    """One kernel: an instance of the template in `csrc/cuda/<source>.cu`.

    Args:
        op: the op it belongs to.
        source: the file's name, without its suffix.
        threads: of a block.
        blocks: at once on a multiprocessor, at least; bounds the registers.
        macros: what the template is instantiated with (names without MMINFER_), in the order of the kernel's name.
    """

    op: str
    source: str
    threads: int
    blocks: int
    macros: tuple[tuple[str, str | int | bool], ...]

    @property
    def kernel(self) -> str:
        """Its name as a function of the compiled code, as "merge_rows_bf16_aligned"."""
        flags = {True: "aligned", False: "unaligned"}
        parts = [flags[value] if isinstance(value, bool) else str(value).lower() for _, value in self.macros]
        return "_".join([self.source, *parts])

    @property
    def defines(self) -> list[str]:
        """The macros as options of a compiler."""
        macros = (("KERNEL", self.kernel), ("THREADS", self.threads), ("BLOCKS", self.blocks), *self.macros)
        return [f"-DMMINFER_{name}={int(value) if isinstance(value, bool) else value}" for name, value in macros]


class CompiledKernel(NamedTuple):
    """What the tables of registers, spills and shared memory are made from."""

    op: str
    kernel: str  # the only function in `cubin`
    cubin: bytes
    threads: int
    shared_bytes: int  # of a block, all of it static
    dtype: str
    size: int | None  # head size, rounded up


class Traffic(NamedTuple):
    """Bytes of GPU memory of one call, counted from its shapes."""

    least_bytes: int  # every input read once, every output written once
    moved_bytes: int  # what the kernels read and write, caches left out


class CompileError(RuntimeError):
    """NVRTC refused a source: its log is the message."""


@functools.cache
def available() -> bool:
    """Whether CUDA kernels can be compiled and launched here: a GPU from sm_80 on and NVRTC."""
    if torch.version.cuda is None or not torch.cuda.is_available() or not has_compiler():
        return False
    return all(architecture(i) >= OLDEST_ARCH for i in range(torch.cuda.device_count()))


@functools.cache
def has_compiler() -> bool:
    """Whether NVRTC can be loaded; needs no GPU."""
    try:
        return int(nvrtc().nvrtcVersion()[0]) == 0
    except (ImportError, OSError, RuntimeError):  # no bindings, or no library behind them
        return False


def nvrtc() -> Any:
    return importlib.import_module("cuda.bindings.nvrtc")


def driver() -> ModuleType:
    return importlib.import_module("cuda.bindings.driver")


@functools.cache
def architecture(device: int) -> int:
    """80 for sm_80."""
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@functools.cache
def multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def compile_kernels(arch: int) -> list[CompiledKernel]:
    """Compile the usual instances of every template, ahead of time and with no GPU.

    Args:
        arch: 80 for sm_80, 90 for sm_90.

    Raises:
        CompileError: NVRTC refused one.
    """
    modules = [importlib.import_module(f"mminfer_kernels.{op}.cuda_kernel") for op in OPS]
    variants = [variant for module in modules for variant in module.usual_variants()]
    with ThreadPoolExecutor() as threads:  # NVRTC works outside Python's lock
        return list(threads.map(lambda variant: compiled(variant, arch), variants))


def compiled(variant: Variant, arch: int) -> CompiledKernel:
    """Compile one instance, or take it from the cache."""
    cubin, macros = cubin_of(variant, arch), dict(variant.macros)
    shared, size = shared_bytes(cubin, variant.kernel), macros.get("SIZE")
    dtype = next(str(dtype) for dtype, name in SCALARS.items() if name == macros["SCALAR"]).removeprefix("torch.")
    return CompiledKernel(
        variant.op, variant.kernel, cubin, variant.threads, shared, dtype, None if size is None else int(size)
    )


@functools.cache
def cubin_of(variant: Variant, arch: int) -> bytes:
    """Machine code of one instance; kept in the cache folder, under a name made from all that goes into it.

    Raises:
        CompileError: NVRTC refused it.
    """
    options = [f"--gpu-architecture=sm_{arch}", "-std=c++17", f"-I{sources() / 'include'}", *variant.defines]
    text = (sources() / "cuda" / f"{variant.source}.cu").read_text("utf-8")
    headers = [path.read_text("utf-8") for path in sorted((sources() / "include" / "mminfer").glob("*.h"))]
    version = nvrtc().nvrtcVersion()[1:]
    key = hashlib.sha256("\0".join([text, *headers, str(version), str(arch), *variant.defines]).encode()).hexdigest()
    file = cache_folder() / "cuda" / f"{variant.kernel}-sm_{arch}-{key[:16]}.cubin"
    check_private(file)
    if file.is_file():
        return file.read_bytes()
    cubin = _compile(text, variant, options)
    _keep(file, cubin)
    return cubin


def _keep(file: Path, content: bytes) -> None:
    """Write in one step, since other processes may be about to; a folder that cannot be written to is no cache."""
    try:
        for folder in (file.parent.parent, file.parent):
            folder.parent.mkdir(parents=True, exist_ok=True)
            folder.mkdir(mode=0o700, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=file.parent, delete=False) as part:
            part.write(content)
        os.replace(part.name, file)
    except OSError as error:
        logger.info("compiled kernels are not kept: %s", error)


def _compile(text: str, variant: Variant, options: list[str]) -> bytes:
    compiler = nvrtc()
    (program,) = checked(compiler.nvrtcCreateProgram(text.encode(), f"{variant.source}.cu".encode(), 0, [], []))
    status = compiler.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])[0]
    try:
        if int(status):
            log = _read(program, compiler.nvrtcGetProgramLogSize, compiler.nvrtcGetProgramLog)
            raise CompileError(f"{variant.kernel}: {status.name}\n{log.decode(errors='replace')}")
        return _read(program, compiler.nvrtcGetCUBINSize, compiler.nvrtcGetCUBIN)
    finally:
        checked(compiler.nvrtcDestroyProgram(program))


def _read(program: Any, size: Any, read: Any) -> bytes:
    (length,) = checked(size(program))
    buffer = bytes(length + 1)  # an object of its own, which bytes of length 1 are not
    checked(read(program, buffer))  # fills it in place
    return buffer[:length]


def row_strides(x: torch.Tensor) -> list[int]:
    """Elements from one index to the next, in every dimension but the last; 0 where there is only one index."""
    return [stride if length > 1 else 0 for stride, length in zip(x.stride()[:-1], x.shape[:-1], strict=True)]


def aligned(*tensors: torch.Tensor) -> bool:
    """Whether every row begins at 16 bytes and holds a multiple of them, so that whole vectors can be loaded."""
    return all(
        x.data_ptr() % 16 == 0 and all(n * x.element_size() % 16 == 0 for n in (*row_strides(x), x.shape[-1]))
        for x in tensors
    )


def checked(answer: tuple[Any, ...]) -> tuple[Any, ...]:
    """What a call of NVRTC or the driver gave, without its status.

    Raises:
        RuntimeError: the status is not success.
    """
    status, *values = answer
    if int(status):
        raise RuntimeError(f"CUDA: {status.name}")
    return tuple(values)


def shared_bytes(cubin: bytes, kernel: str) -> int:
    """Static shared memory of a kernel: the size of its section `.nv.shared.<kernel>`, 0 if there is none."""
    (table,), (count, names) = struct.unpack_from("<Q", cubin, 40), struct.unpack_from("<HH", cubin, 60)  # ELF64
    sections = [struct.unpack_from("<IIQQQQ", cubin, table + 64 * i) for i in range(count)]  # name, .., offset, size
    strings = sections[names][4]
    wanted = f".nv.shared.{kernel}\0".encode()
    for name, *_, size in sections:
        if cubin[strings + name : strings + name + len(wanted)] == wanted:
            return size
    return 0


def launch(variant: Variant, grid: tuple[int, int, int], arguments: ctypes.Structure, device: int) -> None:
    """Start a kernel on torch's current stream.

    Args:
        variant: the kernel, compiled and loaded when first launched.
        grid: blocks in x, y and z.
        arguments: the kernel's only parameter; copied before this returns.
        device: number of the GPU on which everything lies.

    Raises:
        ValueError: there is no grid of this size.
        CompileError: NVRTC refused the kernel.
        RuntimeError: the driver refused the launch.
    """
    checked_grid(variant.kernel, grid)
    with torch.cuda.device(device):
        _ensure_context(device)
        stream = torch.cuda.current_stream(device).cuda_stream
        parameters = (ctypes.c_void_p * 1)(ctypes.addressof(arguments))
        shape = (*grid, variant.threads, 1, 1)
        checked(driver().cuLaunchKernel(_function(variant, device), *shape, 0, stream, ctypes.addressof(parameters), 0))


@functools.cache
def _function(variant: Variant, device: int) -> Any:
    """The kernel, loaded into the context of the device; modules stay loaded as long as the process runs."""
    (module,) = checked(driver().cuModuleLoadData(cubin_of(variant, architecture(device))))
    return checked(driver().cuModuleGetFunction(module, variant.kernel.encode()))[0]


def _ensure_context(device: int) -> None:
    """A thread that has not called CUDA's runtime yet has no context: give it the one that torch uses."""
    cuda = driver()
    (context,) = checked(cuda.cuCtxGetCurrent())
    if int(context) == 0:
        (context,) = checked(cuda.cuDevicePrimaryCtxRetain(checked(cuda.cuDeviceGet(device))[0]))
        checked(cuda.cuCtxSetCurrent(context))
