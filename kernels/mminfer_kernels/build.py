"""The C++ library of the CPU kernels: built once with the machine's compiler, then loaded from a cache folder.

One library an instruction set: which one is built and loaded is decided when it is first asked for, by the processor
that runs. Nothing of torch is compiled against, so a build takes seconds; calls go through ctypes.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

# Associative, but never -ffast-math: linking with it turns denormals off for the whole process.
FLAGS = (
    "-O3", "-std=c++17", "-fPIC", "-fopenmp", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math",
    "-fno-signed-zeros", "-fassociative-math", "-fvisibility=default", "-w",
)  # fmt: skip
ISA_FLAGS = {
    "avx512": ("-march=x86-64-v4", "-mprefer-vector-width=512"),
    "avx2": ("-march=x86-64-v3",),
    "baseline": (),
}
_why_not = ""


def sources() -> Path:
    """The folder of the C++ sources: in the checkout, or beside this file where they were installed."""
    here = Path(__file__).resolve().parent
    checkout = here.parents[1] / "csrc"
    return checkout if checkout.is_dir() else here / "csrc"


def native_isa() -> str:
    """The instruction set to build for: what this processor has, or what `MMINFER_ISA` names."""
    chosen = os.environ.get("MMINFER_ISA", "")
    if chosen in ISA_FLAGS:
        return chosen
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return "baseline"
    return {"AVX512": "avx512", "AVX2": "avx2"}.get(torch.backends.cpu.get_cpu_capability(), "baseline")


def library() -> ctypes.CDLL | None:
    """The loaded library for this processor, built if need be; None, with one log line, where that cannot be done."""
    return _load(native_isa())


def status() -> str:
    """Where the library came from, or why there is none."""
    return f"{native_isa()}, {cached_path(native_isa())}" if library() is not None else _why_not


def cached_path(isa: str) -> Path:
    """Where the library of these sources, this compiler and this instruction set lies or will lie."""
    files = sorted(p for p in sources().rglob("*") if p.suffix in (".h", ".cpp") and "cuda" not in p.parts)
    digest = hashlib.sha256(" ".join([*_compiler(), *FLAGS, *ISA_FLAGS[isa], platform.machine()]).encode())
    for file in files:
        digest.update(file.read_bytes())
    return cache_folder() / f"cpu-{isa}-{digest.hexdigest()[:16]}.so"


def cache_folder() -> Path:
    """`MMINFER_CACHE`, or `mminfer` in the user's cache folder."""
    given = os.environ.get("MMINFER_CACHE")
    return Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mminfer"


@functools.cache
def _load(isa: str) -> ctypes.CDLL | None:
    global _why_not
    try:
        if os.environ.get("MMINFER_NATIVE", "1") == "0":
            raise OSError("MMINFER_NATIVE=0")
        path = cached_path(isa)
        if not path.exists():
            _build(path, isa)
        return ctypes.CDLL(str(path))  # torch is loaded: one OpenMP runtime serves both
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        _why_not = f"no native CPU kernels: {error}"
        logger.warning("mminfer: %s; the PyTorch reference runs instead", _why_not)
        return None


def _compiler() -> list[str]:
    named = os.environ.get("CXX")
    if named:
        return shlex.split(named)
    return [next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), "c++")]


def _build(path: Path, isa: str) -> None:
    """Compiles every source of `csrc/cpu`, and puts the whole library in place at once.

    Raises:
        RuntimeError: there is no compiler, or it found an error.
        OSError: the cache folder cannot be written.
    """
    if shutil.which(_compiler()[0]) is None:
        raise RuntimeError("no C++ compiler (set CXX to one)")
    start = time.perf_counter()
    path.parent.mkdir(parents=True, exist_ok=True)
    flags = [*FLAGS, *ISA_FLAGS[isa], f"-I{sources() / 'include'}"]
    with tempfile.TemporaryDirectory(dir=path.parent) as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        units = {file: Path(folder) / f"{file.stem}.o" for file in sorted((sources() / "cpu").glob("*.cpp"))}
        commands = [[*_compiler(), *flags, "-c", str(file), "-o", str(unit)] for file, unit in units.items()]
        list(pool.map(_run, commands))
        whole = Path(folder) / "library.so"
        _run([*_compiler(), "-shared", "-fopenmp", *map(str, units.values()), "-o", str(whole)])
        os.replace(whole, path)  # several processes may build at once: the last one wins, each whole
    logger.info("mminfer: built the native CPU kernels in %.1f s (%s)", time.perf_counter() - start, path)


def _run(command: list[str]) -> None:
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        raise RuntimeError(f"{command[0]} failed: {run.stderr.strip()[-400:]}")
