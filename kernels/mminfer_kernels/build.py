"""The C++ library of the CPU kernels: built once with the machine's compiler, then loaded from a cache folder.

One library an instruction set: which one is built and loaded is decided when it is first asked for, by the processor
that runs. Nothing of torch is compiled against, so a build takes seconds; calls go through ctypes. Whoever measures
calls `prepare` before the clock starts.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

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
CAPABILITIES_ELSEWHERE = ("default", "vsx", "zvector", "sve", "sve128", "sve256", "sve512")  # than on x86
SEAL_BYTES = 32  # a digest behind the library: a file cut short would not fail to load, but end the process later
COMPILER_SECONDS, LONGEST_FILE_SECONDS = 30, 8  # on one core, all sources and the slowest of them
LONGEST_WAIT_SECONDS = 300  # for another process that builds the same
BUILD_FOLDER = "build-"  # how the names of folders begin that a build writes to
Progress = Callable[[int, int], object]  # told (files done, files in all) while a library is built
_loaded: dict[str, ctypes.CDLL | None] = {}
_loading = threading.Lock()
_why_not = ""


class UnsafeCacheError(RuntimeError):
    """Another user may have put something into the kernel cache, which this process would run."""


def sources() -> Path:
    """The folder of the C++ sources: beside this file, where a wheel has a copy and a checkout a link to it."""
    here = Path(__file__).resolve().parent
    beside = here / "csrc"
    return (beside if beside.is_dir() else here.parents[1] / "csrc").resolve()  # git may write links as plain files


@functools.cache  # every step of decoding asks
def processor_isas() -> tuple[str, ...]:
    """The instruction sets that this processor runs, the widest first, whatever the environment says."""
    names = tuple(ISA_FLAGS)
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return names[-1:]
    asked = (("avx512", "_is_avx512_supported"), ("avx2", "_is_avx2_supported"))
    found = [name for name, question in asked if getattr(getattr(torch, "cpu", None), question, lambda: False)()]
    return names[names.index(found[0] if found else "baseline") :]


def runnable_isas() -> tuple[str, ...]:
    """Those of them that torch uses, too: `ATEN_CPU_CAPABILITY` may keep it to fewer.

    Raises:
        ValueError: it names none, or one that this processor does not run, which ends the process in torch's kernels.
    """
    names = processor_isas()
    chosen = os.environ.get("ATEN_CPU_CAPABILITY")
    if not chosen:
        return names
    if platform.machine().lower() not in ("x86_64", "amd64"):
        known: tuple[str, ...] = CAPABILITIES_ELSEWHERE
    else:
        known = tuple("default" if name == "baseline" else name for name in names)
    if chosen not in known:
        wanted = ", ".join(known)
        raise ValueError(f"ATEN_CPU_CAPABILITY is {chosen[:100]!r}, wanted one of {wanted} on this machine, or nothing")
    return names[names.index("baseline" if chosen not in names else chosen) :]


def native_isa() -> str:
    """The instruction set to build for: the widest that this processor runs, or what `MMINFER_ISA` names.

    Raises:
        ValueError: `MMINFER_ISA` or `ATEN_CPU_CAPABILITY` names none, or one that this processor does not run.
    """
    runnable, chosen = runnable_isas(), os.environ.get("MMINFER_ISA")
    if chosen and chosen not in runnable:
        raise ValueError(
            f"MMINFER_ISA is {chosen[:100]!r}, wanted one of {', '.join(runnable)} on this machine, or nothing"
        )
    return chosen or runnable[0]


def library(on_progress: Progress | None = None) -> ctypes.CDLL | None:
    """The loaded library for this processor, built if need be; None, with one log line, where that cannot be done.

    A build is announced by one line of the log and takes `COMPILER_SECONDS` of one core.

    Args:
        on_progress: told how many files are done, and of how many, if something is built.

    Raises:
        UnsafeCacheError: others may write to the folder that libraries are kept in, or have.
    """
    isa = native_isa()
    if isa not in _loaded:
        with _loading:
            if isa not in _loaded:  # or another thread was first
                _loaded[isa] = _load(isa, on_progress)
    return _loaded[isa]


def prepare(device: torch.device | str, on_progress: Progress | None = None) -> None:
    """Builds and loads what the ops will ask for on this device, so that none of them waits for it in a timed call.

    Does nothing where that is done, cannot be done, or is not needed: anywhere but on the CPU.

    Args:
        device: of the tensors to come.
        on_progress: as for `library`.
    """
    if torch.device(device).type == "cpu":
        library(on_progress)


def status() -> str:
    """Where the library came from, that it is still to be built, or why there is none; builds nothing."""
    isa = native_isa()
    if isa in _loaded or not is_pending():
        return f"{isa}, {cached_path(isa)}" if library() is not None else _why_not
    return f"not built yet: C++ for {isa}, which takes about {build_seconds()} s once"


def is_pending() -> bool:
    """Whether the next call of `library` will have to build it, and can try."""
    isa = native_isa()
    if isa in _loaded or _switched_off():
        return False
    try:
        _check_buildable()
        return not _is_whole(cached_path(isa))
    except (OSError, RuntimeError, ValueError):
        return False


def build_seconds() -> int:
    """About how long a build takes on this machine's cores."""
    return max(LONGEST_FILE_SECONDS, COMPILER_SECONDS // _cores())


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


def check_private(path: Path) -> None:
    """Raises `UnsafeCacheError` if anybody but this user and root may have put something at `path` or on the way.

    On Windows, which keeps a user's folders from others, and for what is not there, it does nothing.

    Args:
        path: a file or folder of the cache; the folders from it up to the cache folder count as well.
    """
    if not hasattr(os, "geteuid"):
        return
    top = cache_folder()
    for place in (path, *(folder for folder in path.parents if folder == top or top in folder.parents)):
        link, found = (_stat(place, follow) for follow in (False, True))
        if link is None or found is None:
            continue
        foreign = {link.st_uid, found.st_uid} - {0, os.geteuid()}
        if foreign:
            why, cure = f"belongs to user {foreign.pop()}", "remove it"
        elif stat.S_IMODE(found.st_mode) & 0o022:
            why, cure = f"may be written by others (mode {stat.S_IMODE(found.st_mode):o})", f"chmod -R go-w {place}"
        elif place == path and stat.S_ISLNK(link.st_mode):
            why, cure = f"is a link to {place.resolve()}", "remove it"
        else:
            continue
        raise UnsafeCacheError(
            f"{place} {why}, and what lies there would be run: {cure}, or set MMINFER_CACHE to a folder of your own"
        )


def _stat(path: Path, follow: bool) -> os.stat_result | None:
    try:
        return os.stat(path, follow_symlinks=follow)
    except (FileNotFoundError, NotADirectoryError):
        return None


def _load(isa: str, on_progress: Progress | None) -> ctypes.CDLL | None:
    global _why_not
    try:
        if _switched_off():
            raise OSError("MMINFER_NATIVE=0")
        path = cached_path(isa)
        check_private(path)
        if not _is_whole(path):
            _check_buildable()
            path.parent.parent.mkdir(parents=True, exist_ok=True)
            path.parent.mkdir(mode=0o700, exist_ok=True)
            with _alone_in(path.parent):
                if not _is_whole(path):  # or another process was first
                    _build(path, isa, on_progress)
        return ctypes.CDLL(str(path))  # torch is loaded: one OpenMP runtime serves both
    except UnsafeCacheError:  # not to be passed over: somebody may have meant it
        raise
    except (OSError, RuntimeError, ValueError, subprocess.SubprocessError) as error:
        _why_not = f"no native CPU kernels: {error}"
        logger.warning("mminfer: %s; the PyTorch reference runs instead", _why_not)
        return None


def _switched_off() -> bool:
    return os.environ.get("MMINFER_NATIVE", "1") == "0"


def _check_buildable() -> None:
    """Raises `RuntimeError` where there is no compiler, or there are no sources."""
    if shutil.which(_compiler()[0]) is None:
        raise RuntimeError("no C++ compiler (set CXX to one)")
    if not _source_files():
        raise RuntimeError(f"no C++ sources in {sources() / 'cpu'}")


def _source_files() -> list[Path]:
    return sorted((sources() / "cpu").glob("*.cpp"))


def _cores() -> int:
    """Of those that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Waits until no other process builds into this folder, where the system can lock one; a crash leaves no lock."""
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        _lock(descriptor)
        yield
    finally:
        os.close(descriptor)  # which gives the lock back


def _lock(descriptor: int) -> None:
    """Without a lock in the end, the library is built once more: it is put in place whole, so the last one wins."""
    start, announced = time.monotonic(), False
    while time.monotonic() - start < LONGEST_WAIT_SECONDS:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not announced:
                logger.warning("mminfer: waiting for another process that builds the native CPU kernels")
            announced = True
            time.sleep(0.1)
        except OSError:  # a file system without locks
            return
        else:
            return


def _compiler() -> list[str]:
    named = shlex.split(os.environ.get("CXX", ""))
    if named:
        return named
    return [next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), "c++")]


def _build(path: Path, isa: str, on_progress: Progress | None) -> None:
    """Compiles every source of `csrc/cpu`, and puts the whole library in place at once.

    Raises:
        RuntimeError: the compiler found an error.
        OSError: the cache folder cannot be written.
    """
    start = time.perf_counter()
    flags = [*FLAGS, *ISA_FLAGS[isa], f"-I{sources() / 'include'}"]
    _remove_abandoned(path.parent)
    with tempfile.TemporaryDirectory(prefix=BUILD_FOLDER, dir=path.parent) as folder:
        logger.warning(
            "mminfer: building the native CPU kernels (C++ for %s), which takes about %d s once; they are kept in %s",
            isa,
            build_seconds(),
            path.parent,
        )
        units = {file: Path(folder) / f"{file.stem}.o" for file in _source_files()}
        commands = [[*_compiler(), *flags, "-c", str(file), "-o", str(unit)] for file, unit in units.items()]
        _compile(commands, on_progress)
        whole = Path(folder) / "library.so"
        _run([*_compiler(), "-shared", "-fopenmp", *map(str, units.values()), "-o", str(whole)])
        code = whole.read_bytes()
        whole.write_bytes(code + hashlib.sha256(code).digest())
        whole.chmod(0o755)  # however the user's mask is: what others may write is not loaded
        os.replace(whole, path)  # where folders cannot be locked the last of several processes wins, each whole
    logger.info("mminfer: built the native CPU kernels in %.1f s (%s)", time.perf_counter() - start, path)


def _remove_abandoned(cache: Path) -> None:
    """Removes what builds that were killed have left; one that may still run without a lock is let be."""
    for folder in cache.glob(f"{BUILD_FOLDER}*"):
        with suppress(OSError):
            if time.time() - folder.stat().st_mtime > LONGEST_WAIT_SECONDS:
                shutil.rmtree(folder)


def _compile(commands: Sequence[list[str]], on_progress: Progress | None) -> None:
    """Runs the compiler's commands, as many at once as there are cores."""
    on_progress = on_progress or (lambda done, total: None)
    on_progress(0, len(commands))
    with ThreadPoolExecutor(_cores()) as pool:
        runs = [pool.submit(_run, command) for command in commands]
        try:
            for done, run in enumerate(as_completed(runs), 1):
                run.result()
                on_progress(done, len(commands))
        except BaseException:  # Ctrl-C as well as an error: what has not begun does not begin
            pool.shutdown(wait=False, cancel_futures=True)
            raise


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
