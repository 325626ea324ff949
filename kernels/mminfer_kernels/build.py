"""The C++ library of the CPU kernels: built once with the machine's compiler, then loaded from a cache folder.

One library an instruction set: which one is built and loaded is decided when it is first asked for, by the processor
that runs. Nothing of torch is compiled against, so a build takes seconds; calls go through ctypes.
"""

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import threading
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
ISA_FLAGS = {  # the widest first
    "avx512": ("-march=x86-64-v4", "-mprefer-vector-width=512"),
    "avx2": ("-march=x86-64-v3",),
    "baseline": (),
}
SEAL_BYTES = 32  # a digest behind the library: a file cut short would not fail to load, but end the process later
_loaded: dict[str, ctypes.CDLL | None] = {}
_loading = threading.Lock()
_why_not = ""


def sources() -> Path:
    """The folder of the C++ sources: beside this file, where a wheel has a copy and a checkout a link to it."""
    here = Path(__file__).resolve().parent
    beside = here / "csrc"
    return (beside if beside.is_dir() else here.parents[1] / "csrc").resolve()  # git may write links as plain files


def runnable_isas() -> tuple[str, ...]:
    """The instruction sets that this processor runs, the widest first."""
    names = tuple(ISA_FLAGS)
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return names[-1:]
    widest = {"AVX512": "avx512", "AVX2": "avx2"}.get(torch.backends.cpu.get_cpu_capability(), "baseline")
    return names[names.index(widest) :]


def native_isa() -> str:
    """The instruction set to build for: the widest that this processor runs, or what `MMINFER_ISA` names.

    Raises:
        ValueError: `MMINFER_ISA` names none, or one that this processor does not run.
    """
    runnable, chosen = runnable_isas(), os.environ.get("MMINFER_ISA")
    if chosen and chosen not in runnable:
        raise ValueError(f"MMINFER_ISA is {chosen!r}, wanted one of {', '.join(runnable)} on this machine, or nothing")
    return chosen or runnable[0]


def library() -> ctypes.CDLL | None:
    """The loaded library for this processor, built if need be; None, with one log line, where that cannot be done."""
    isa = native_isa()
    if isa not in _loaded:
        with _loading:
            if isa not in _loaded:  # or another thread was first
                _loaded[isa] = _load(isa)
    return _loaded[isa]


def status() -> str:
    """Where the library came from, or why there is none."""
    return f"{native_isa()}, {cached_path(native_isa())}" if library() is not None else _why_not


def cached_path(isa: str) -> Path:
    """Where the library of these sources, this compiler and this instruction set lies or will lie."""
    root = sources()
    names = sorted(p.relative_to(root) for p in root.rglob("*") if p.suffix in (".h", ".cpp"))
    # CXX and not the compiler found: what was built is found again where there is none
    digest = hashlib.sha256(" ".join([os.environ.get("CXX", ""), *FLAGS, *ISA_FLAGS[isa], platform.machine()]).encode())
    for name in names:
        if "cuda" not in name.parts:
            digest.update(name.as_posix().encode() + (root / name).read_bytes())
    return cache_folder() / f"cpu-{isa}-{digest.hexdigest()[:16]}.so"


def cache_folder() -> Path:
    """`MMINFER_CACHE`, or `mminfer` in the user's cache folder."""
    given = os.environ.get("MMINFER_CACHE")
    return Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mminfer"


def _load(isa: str) -> ctypes.CDLL | None:
    global _why_not
    try:
        if os.environ.get("MMINFER_NATIVE", "1") == "0":
            raise OSError("MMINFER_NATIVE=0")
        path = cached_path(isa)
        if not _is_whole(path):
            _build(path, isa)
        return ctypes.CDLL(str(path))  # torch is loaded: one OpenMP runtime serves both
    except (OSError, RuntimeError, ValueError, subprocess.SubprocessError) as error:
        _why_not = f"no native CPU kernels: {error}"
        logger.warning("mminfer: %s; the PyTorch reference runs instead", _why_not)
        return None


def _compiler() -> list[str]:
    named = shlex.split(os.environ.get("CXX", ""))
    if named:
        return named
    return [next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), "c++")]


def _build(path: Path, isa: str) -> None:
    """Compiles every source of `csrc/cpu`, and puts the whole library in place at once.

    Raises:
        RuntimeError: there is no compiler, or it found an error; or there are no sources.
        OSError: the cache folder cannot be written.
    """
    if shutil.which(_compiler()[0]) is None:
        raise RuntimeError("no C++ compiler (set CXX to one)")
    files = sorted((sources() / "cpu").glob("*.cpp"))
    if not files:
        raise RuntimeError(f"no C++ sources in {sources() / 'cpu'}")
    start = time.perf_counter()
    path.parent.mkdir(parents=True, exist_ok=True)
    flags = [*FLAGS, *ISA_FLAGS[isa], f"-I{sources() / 'include'}"]
    with tempfile.TemporaryDirectory(dir=path.parent) as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        units = {file: Path(folder) / f"{file.stem}.o" for file in files}
        commands = [[*_compiler(), *flags, "-c", str(file), "-o", str(unit)] for file, unit in units.items()]
        list(pool.map(_run, commands))
        whole = Path(folder) / "library.so"
        _run([*_compiler(), "-shared", "-fopenmp", *map(str, units.values()), "-o", str(whole)])
        code = whole.read_bytes()
        whole.write_bytes(code + hashlib.sha256(code).digest())
        os.replace(whole, path)  # several processes may build at once: the last one wins, each whole
    logger.info("mminfer: built the native CPU kernels in %.1f s (%s)", time.perf_counter() - start, path)


def _is_whole(path: Path) -> bool:
    """Whether there is a library at `path`, and all of it."""
    if not path.is_file():
        return False
    code = path.read_bytes()
    return hashlib.sha256(code[:-SEAL_BYTES]).digest() == code[-SEAL_BYTES:]


def _run(command: list[str]) -> None:
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        raise RuntimeError(f"{command[0]} failed: {' '.join(run.stderr.split())[-400:]}")
