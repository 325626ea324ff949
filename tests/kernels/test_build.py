"""How the C++ library is built, found again, and done without; each in a process of its own."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from pathlib import Path

import pytest
from mminfer_kernels import build

from mminfer import InputError
from mminfer.forward.native_build import prepare_kernels

ROOT = Path(__file__).parents[2]
SWITCHES = ("CXX", "MMINFER_CACHE", "MMINFER_ISA", "MMINFER_NATIVE")

# Warnings alone are printed to stderr, one a line. Most need no more of the package than `build.py`, and of torch no
# more than what the processor runs: torch itself takes seconds to load.
BUILD = """
import importlib.util, logging, sys, types
from pathlib import Path
logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
torch = sys.modules["torch"] = types.ModuleType("torch")
torch.backends = types.SimpleNamespace(cpu=types.SimpleNamespace(get_cpu_capability=lambda: "DEFAULT"))
file = Path(sys.path[1]) / "mminfer_kernels" / "build.py"
spec = importlib.util.spec_from_file_location("mminfer_kernels.build", file)
build = importlib.util.module_from_spec(spec)
spec.loader.exec_module(build)
"""
LOAD = (
    BUILD
    + """
for _ in range(3):
    library = build.library()
print("reference" if library is None else "native" if library.mminfer_stub() == 7 else "wrong")
print(build.status())
"""
)
NAME = (
    BUILD
    + """
print(build.sources())
print(build.cached_path("baseline").name)
"""
)
WHOLE = """
import logging
logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
import torch, mminfer_kernels
from mminfer_kernels import build
x = torch.arange(6.0).view(2, 3)
for _ in range(3):
    assert mminfer_kernels.swiglu(x, x).shape == (2, 3)
    mminfer_kernels.merge_rows(x, x, torch.tensor([0, 0]))
print(mminfer_kernels.backends_used()["swiglu"])
print(build.status())
"""


def start(program=LOAD, folder=ROOT / "kernels", **switches):
    env = {k: v for k, v in os.environ.items() if k not in SWITCHES}
    env |= {"PYTHONPATH": str(folder), **{k: str(v) for k, v in switches.items()}}
    return subprocess.Popen(
        [sys.executable, "-c", program], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


ANNOUNCEMENTS = ("mminfer: building the native CPU kernels", "mminfer: waiting for another process")


def finish(process):
    """The lines on stdout and on stderr; without those that announce a wait, see `finish_and_tell`."""
    out, errors, _ = finish_and_tell(process)
    return out, errors


def finish_and_tell(process):
    """The lines on stdout, on stderr, and of these those that announce a wait."""
    out, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    lines = errors.splitlines()
    announced = [line for line in lines if line.partition(": ")[2].startswith(ANNOUNCEMENTS)]
    return out.splitlines(), [line for line in lines if line not in announced], announced


@pytest.fixture
def small(tmp_path):
    """A package of `build.py` and one small source."""
    package = tmp_path / "small" / "mminfer_kernels"
    (package / "csrc" / "cpu").mkdir(parents=True)
    (package / "build.py").write_bytes((ROOT / "kernels" / "mminfer_kernels" / "build.py").read_bytes())
    (package / "csrc" / "cpu" / "stub.cpp").write_text('extern "C" int mminfer_stub() { return 7; }\n')
    return tmp_path / "small"


@pytest.fixture
def compiler(native, tmp_path):
    """A compiler that notes each call; also gives where it notes them."""
    script, log = tmp_path / "compiler", tmp_path / "calls"
    script.write_text(f'#!/bin/sh\necho called >> {log}\nexec {build._compiler()[0]} "$@"\n')
    script.chmod(0o755)
    log.touch()
    return script, log


def library_in(folder):
    (path,) = folder.glob("cpu-*.so")
    assert list(folder.iterdir()) == [path]  # no folder left behind
    return path


def calls_of(log):
    return len(log.read_text().split())


def test_built_once_and_found_again(small, compiler, tmp_path):
    script, log = compiler
    cache = tmp_path / "cache"
    for _ in range(2):
        out, errors = finish(start(folder=small, MMINFER_CACHE=cache, CXX=script))
        assert out[0] == "native" and errors == []
        assert out[1] == f"baseline, {library_in(cache)}"
        assert calls_of(log) == 2  # one source, one link


def test_found_again_where_there_is_no_compiler(small, native, tmp_path):
    cache = tmp_path / "cache"
    finish(start(folder=small, MMINFER_CACHE=cache))
    out, errors = finish(start(folder=small, MMINFER_CACHE=cache, PATH="/nowhere"))
    assert out[0] == "native" and errors == []


def test_other_sources_are_another_library(small, compiler, tmp_path):
    script, log = compiler
    switches = {"folder": small, "MMINFER_CACHE": tmp_path / "cache", "CXX": script}
    finish(start(**switches))
    header = small / "mminfer_kernels" / "csrc" / "include" / "new.h"
    header.parent.mkdir()
    header.write_text("// changed\n")
    finish(start(**switches))
    assert len(list((tmp_path / "cache").glob("*.so"))) == 2 and calls_of(log) == 4
    header.unlink()


def test_two_processes_at_once_both_end_with_a_library(small, compiler, tmp_path):
    script, log = compiler
    cache = tmp_path / "cache"
    processes = [start(folder=small, MMINFER_CACHE=cache, CXX=script) for _ in range(2)]
    for process in processes:
        out, errors = finish(process)
        assert out[0] == "native" and errors == []
    library_in(cache)
    assert calls_of(log) in (2, 4)


def test_a_build_is_announced_and_nothing_else(small, compiler, tmp_path):
    cache = tmp_path / "cache"
    told = [finish_and_tell(start(folder=small, MMINFER_CACHE=cache, CXX=compiler[0]))[2] for _ in range(2)]
    (line,), nothing = told
    assert "C++ for baseline" in line and line.endswith(f"they are kept in {cache}") and nothing == []
    assert re.search(r"about \d+ s once", line)


def test_a_process_waits_for_the_one_that_builds(small, compiler, tmp_path):
    """Whoever comes second compiles nothing, and says what it waits for."""
    script, log = slow_compiler(tmp_path)
    switches = {"folder": small, "MMINFER_CACHE": tmp_path / "cache", "CXX": script}
    first = start(**switches)
    wait_until(log.exists)
    second = start(**switches)
    told = [finish_and_tell(second), finish_and_tell(first)]
    assert [out[0] for out, *_ in told] == ["native", "native"] and [errors for _, errors, _ in told] == [[], []]
    assert "waiting for another process" in told[0][2][0] and len(told[0][2]) == 1
    assert calls_of(log) == 2


def test_a_crash_while_building_stops_nobody(small, native, tmp_path):
    script, log = slow_compiler(tmp_path)
    switches = {"folder": small, "MMINFER_CACHE": tmp_path / "cache", "CXX": script}
    crashed = start(**switches)
    wait_until(log.exists)
    crashed.kill()
    crashed.communicate()
    out, errors = finish(start(**switches))
    assert out[0] == "native" and errors == []


def test_what_a_killed_build_left_is_removed(small, compiler, tmp_path):
    """Once it is so old that nobody can still be building there."""
    script, _ = compiler
    for name, age in (("build-old", build.LONGEST_WAIT_SECONDS + 60), ("build-new", 0)):
        (tmp_path / "cache" / name).mkdir(parents=True)
        (tmp_path / "cache" / name / "unit.o").write_text("half")
        os.utime(tmp_path / "cache" / name, (time.time() - age,) * 2)
    out, _ = finish(start(folder=small, MMINFER_CACHE=tmp_path / "cache", CXX=script))
    assert out[0] == "native"
    assert [path.name for path in (tmp_path / "cache").glob("build-*")] == ["build-new"]


def test_without_locks_every_process_builds(small, compiler, tmp_path):
    """As where the module `fcntl` does not exist, and where a file system has no locks."""
    script, log = compiler
    lost = "import sys; sys.modules['fcntl'] = None\n"
    locked = BUILD + "def none(*_): raise OSError('no locks')\nbuild.fcntl.flock = none\n"
    for n, program in enumerate((lost + LOAD, locked + LOAD.removeprefix(BUILD)), 1):
        out, errors = finish(start(program, small, MMINFER_CACHE=tmp_path / str(n), CXX=script))
        assert out[0] == "native" and errors == [] and calls_of(log) == 2 * n


def slow_compiler(tmp_path):
    """A compiler that notes each call and takes a second before; also gives where it notes them."""
    script, log = tmp_path / "slow", tmp_path / "slow calls"
    script.write_text(f'#!/bin/sh\necho called >> "{log}"\nsleep 1\nexec {build._compiler()[0]} "$@"\n')
    script.chmod(0o755)
    return script, log


def wait_until(true):
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


REPORTED = (
    BUILD
    + """
torch.device = lambda name: types.SimpleNamespace(type=name)
print(build.is_pending(), build.status())
build.prepare("cuda", print)
print(build.is_pending())
build.prepare("cpu", print)
build.prepare("cpu", print)
print(build.is_pending())
"""
)


def test_preparing_builds_once_for_the_cpu_alone_and_reports(small, native, tmp_path):
    (small / "mminfer_kernels" / "csrc" / "cpu" / "other.cpp").write_text('extern "C" int other() { return 8; }\n')
    out, errors = finish(start(REPORTED, small, MMINFER_CACHE=tmp_path / "cache"))
    assert out[0].startswith("True not built yet: C++ for baseline") and errors == []
    assert out[1:] == ["True", "0 2", "1 2", "2 2", "False"]
    out, _ = finish(start(REPORTED, small, MMINFER_CACHE=tmp_path / "cache"))
    assert out == [f"False baseline, {library_in(tmp_path / 'cache')}", "False", "False"]


PENDING = """
import logging
logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
import mminfer_kernels
from mminfer_kernels import build, status
for op in mminfer_kernels.OPS:
    print(*status.choices(op)[0], sep="; ")
print(build.status())
"""


@pytest.mark.slow
def test_what_ops_run_with_is_told_without_building(native, tmp_path):
    """The same table before and behind the build, and where nothing can be built."""
    switches = ({}, {"PATH": "/nowhere"}, {"MMINFER_CACHE": os.environ.get("MMINFER_CACHE", "")})
    pending, without, built = (
        finish(start(PENDING, **{"MMINFER_CACHE": tmp_path / "cache", **own}))[0] for own in switches
    )
    assert not (tmp_path / "cache").exists()
    assert [line.replace(", not built yet", "") for line in pending[:-1]] == built[:-1] and pending[:-1] != built[:-1]
    assert "not built yet" in pending[-1] and "no C++ compiler" in without[-1]
    assert all("; native; " not in line for line in without)


def damage(path, how):
    code = path.read_bytes()
    if how == "empty":
        path.write_bytes(b"")
    elif how == "cut short":
        path.write_bytes(code[: len(code) // 2])
    elif how == "text":
        path.write_text("not a library")
    else:
        path.write_bytes(code[:5000] + bytes([code[5000] ^ 1]) + code[5001:])


@pytest.mark.slow
@pytest.mark.parametrize("how", ["empty", "cut short", "text", "a bit"])
def test_a_damaged_library_is_built_again(small, compiler, tmp_path, how):
    script, log = compiler
    cache = tmp_path / "cache"
    finish(start(folder=small, MMINFER_CACHE=cache, CXX=script))
    whole = library_in(cache).stat().st_size
    damage(library_in(cache), how)
    out, errors = finish(start(folder=small, MMINFER_CACHE=cache, CXX=script))
    assert out[0] == "native" and errors == [] and calls_of(log) == 4
    assert library_in(cache).stat().st_size == whole


def test_a_damaged_library_without_a_compiler_falls_back(small, native, tmp_path):
    cache = tmp_path / "cache"
    finish(start(folder=small, MMINFER_CACHE=cache))
    damage(library_in(cache), "cut short")
    out, errors = finish(start(folder=small, MMINFER_CACHE=cache, PATH="/nowhere"))
    assert out[0] == "reference" and len(errors) == 1 and "no C++ compiler" in errors[0]


def broken_compiler(tmp_path):
    script = tmp_path / "broken"
    script.write_text("#!/bin/sh\necho 'first line' >&2\necho 'internal error' >&2\nexit 1\n")
    script.chmod(0o755)
    return script


FAILURES = {
    "compiler fails": (lambda tmp_path: {"CXX": broken_compiler(tmp_path)}, "broken failed: first line internal error"),
    "compiler named is missing": (lambda tmp_path: {"CXX": tmp_path / "missing"}, "no C++ compiler"),
    "compiler named is nonsense": (lambda _: {"CXX": "'unclosed"}, "No closing quotation"),
    "no compiler": (lambda _: {"PATH": "/nowhere"}, "no C++ compiler"),
    "off": (lambda _: {"MMINFER_NATIVE": 0}, "MMINFER_NATIVE=0"),
    "no cache": (lambda _: {"MMINFER_CACHE": "/dev/null/cache"}, "/dev/null"),
}


def assert_falls_back(process, reason):
    out, errors = finish(process)
    assert out[0] == "reference" and reason in out[1]
    assert len(errors) == 1 and reason in errors[0] and "reference runs instead" in errors[0]


@pytest.mark.parametrize("name", FAILURES)
def test_one_log_line_and_no_library(small, tmp_path, name):
    switches, reason = FAILURES[name]
    assert_falls_back(start(folder=small, **{"MMINFER_CACHE": tmp_path / "cache", **switches(tmp_path)}), reason)
    assert not list(tmp_path.glob("cache/*"))


@pytest.mark.slow
def test_the_reference_runs_instead(tmp_path):
    names = ("compiler fails", "off")
    processes = [start(WHOLE, MMINFER_CACHE=tmp_path / "cache", **FAILURES[name][0](tmp_path)) for name in names]
    for name, process in zip(names, processes, strict=True):
        assert_falls_back(process, FAILURES[name][1])


def test_missing_sources_are_said(small, tmp_path):
    (small / "mminfer_kernels" / "csrc" / "cpu" / "stub.cpp").unlink()
    assert_falls_back(start(folder=small, MMINFER_CACHE=tmp_path / "cache"), "no C++ sources")


def test_an_instruction_set_that_cannot_be(monkeypatch):
    monkeypatch.setenv("MMINFER_ISA", "avx3")
    with pytest.raises(ValueError, match=r"MMINFER_ISA is 'avx3', wanted one of .*baseline"):
        build.native_isa()
    monkeypatch.setattr(build, "runnable_isas", lambda: ("avx2", "baseline"))
    monkeypatch.setenv("MMINFER_ISA", "avx512")
    with pytest.raises(ValueError, match="wanted one of avx2, baseline on this machine"):
        build.native_isa()
    monkeypatch.setenv("MMINFER_ISA", "")
    assert build.native_isa() == "avx2"


def test_what_torch_is_told_to_use_is_held_to_the_processor(monkeypatch):
    """Torch believes it, and ends in an illegal instruction."""
    monkeypatch.setattr(build, "processor_isas", lambda: ("avx2", "baseline"))
    monkeypatch.setattr(build.platform, "machine", lambda: "x86_64")
    monkeypatch.delenv("MMINFER_ISA", raising=False)
    for chosen, wanted in ((None, "avx2"), ("", "avx2"), ("avx2", "avx2"), ("default", "baseline")):
        monkeypatch.setenv("ATEN_CPU_CAPABILITY", chosen or "")
        assert build.native_isa() == wanted
    for chosen in ("avx512", "AVX2", "baseline", "sve256", "nonsense", "x" * 1000):
        monkeypatch.setenv("ATEN_CPU_CAPABILITY", chosen)
        with pytest.raises(ValueError, match=r"ATEN_CPU_CAPABILITY is '\w{1,100}', wanted one of avx2, default on"):
            build.native_isa()
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "default")
    monkeypatch.setenv("MMINFER_ISA", "avx2")
    with pytest.raises(ValueError, match="MMINFER_ISA is 'avx2', wanted one of baseline"):
        build.native_isa()


def test_the_processor_is_asked_and_not_the_environment(monkeypatch):
    monkeypatch.delenv("ATEN_CPU_CAPABILITY", raising=False)
    assert build.runnable_isas() == build.processor_isas()
    for names in (build.ISA_FLAGS, tuple(build.ISA_FLAGS)[1:], ("baseline",)):
        monkeypatch.setattr(build.torch.cpu, "_is_avx512_supported", lambda names=names: "avx512" in names)
        monkeypatch.setattr(build.torch.cpu, "_is_avx2_supported", lambda names=names: "avx2" in names)
        monkeypatch.setattr(build.platform, "machine", lambda: "x86_64")
        assert build.processor_isas.__wrapped__() == tuple(names)
    monkeypatch.setattr(build.platform, "machine", lambda: "aarch64")
    assert build.processor_isas.__wrapped__() == ("baseline",)


@pytest.mark.parametrize("name", ["ATEN_CPU_CAPABILITY", "MMINFER_ISA"])
def test_the_command_line_names_the_variable(name):
    run = subprocess.run(
        [sys.executable, "-c", "from mminfer.cli.main import main; main()", "generate", "--max-new-tokens", "1"],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {name: "beyond"},
    )
    assert run.returncode == 2 and "Traceback" not in run.stderr
    assert f"{name} is 'beyond'" in " ".join(run.stderr.split())


posix = pytest.mark.skipif(not hasattr(os, "geteuid"), reason="there are no owners here")


def opened(folder, path):
    folder.chmod(0o777)


def opened_to_the_group(folder, path):
    folder.chmod(0o770)


def opened_file(folder, path):
    path.chmod(0o666)


def linked_file(folder, path):
    path.rename(folder / "elsewhere.so")
    path.symlink_to(folder / "elsewhere.so")


def given_away(folder, path):
    os.chown(path, 12345, -1)


def folder_given_away(folder, path):
    os.chown(folder, 12345, -1)


def linked_to_anothers(folder, path):
    folder.rename(folder.with_name("theirs"))
    os.chown(folder.with_name("theirs"), 12345, -1)
    folder.symlink_to(folder.with_name("theirs"))


WAYS = (opened, opened_to_the_group, opened_file, linked_file, given_away, folder_given_away, linked_to_anothers)


@posix
@pytest.mark.parametrize("spoil", WAYS)
def test_what_others_may_have_put_into_the_cache_is_not_run(monkeypatch, tmp_path, spoil):
    monkeypatch.setenv("MMINFER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MMINFER_ISA", "baseline")
    monkeypatch.setattr(build, "_loaded", {})
    path = build.cached_path("baseline")
    path.parent.mkdir(mode=0o700)
    path.write_bytes(b"never loaded")
    path.chmod(0o644)
    build.check_private(path)
    try:
        spoil(path.parent, path)
    except PermissionError:
        pytest.skip("only root gives files away")
    with pytest.raises(build.UnsafeCacheError, match=rf"{tmp_path}/cache.*MMINFER_CACHE"):
        build._load("baseline", None)
    with pytest.raises(InputError, match="or set MMINFER_CACHE"):
        prepare_kernels("cpu")


@posix
def test_a_folder_of_ones_own_behind_a_link_is_used(monkeypatch, tmp_path):
    (tmp_path / "disk").mkdir(mode=0o700)
    (tmp_path / "cache").symlink_to(tmp_path / "disk")
    monkeypatch.setenv("MMINFER_CACHE", str(tmp_path / "cache"))
    build.check_private(build.cached_path("baseline"))


def test_where_there_are_no_owners_nothing_is_asked(monkeypatch, tmp_path):
    monkeypatch.delattr(os, "geteuid", raising=False)
    monkeypatch.setenv("MMINFER_CACHE", str(tmp_path))
    tmp_path.chmod(0o777)
    build.check_private(build.cached_path("baseline"))


@posix
def test_a_build_is_private_whatever_the_mask(small, native, tmp_path):
    finish(start("import os; os.umask(0)\n" + LOAD, small, MMINFER_CACHE=tmp_path / "deep" / "cache"))
    path = library_in(tmp_path / "deep" / "cache")
    assert path.stat().st_mode & 0o022 == 0 and path.parent.stat().st_mode & 0o077 == 0
    out, errors = finish(start("import os; os.umask(0)\n" + LOAD, small, MMINFER_CACHE=tmp_path / "deep" / "cache"))
    assert out[0] == "native" and not errors


def test_threads_load_once(monkeypatch):
    loads = []

    def load(isa, on_progress):
        loads.append(isa)
        arrived.wait(0.2)

    arrived = threading.Event()
    monkeypatch.setattr(build, "_loaded", {})
    monkeypatch.setattr(build, "_load", load)
    threads = [threading.Thread(target=build.library) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(loads) == 1


def test_the_name_does_not_hang_on_where_the_sources_lie(small, tmp_path):
    """Not even below a folder named like those that are left out; it does on what is in them, and on their names."""

    def name(folder):
        return finish(start(NAME, folder))[0][1]

    there = tmp_path / "cuda" / "checkout"
    shutil.copytree(small, there)
    before = name(small)
    assert name(there) == before
    source = there / "mminfer_kernels" / "csrc" / "cpu" / "stub.cpp"
    source.write_text("// other")
    assert name(there) != before
    (small / "mminfer_kernels" / "csrc" / "cpu" / "stub.cpp").rename(source.with_name("other.cpp"))
    source.unlink()
    assert name(there) != before


WANTED = sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "csrc").rglob("*") if p.suffix in (".cpp", ".h", ".cu"))


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    """A wheel and an sdist of a copy of the tree, as setuptools makes them; nothing is downloaded."""
    pytest.importorskip("setuptools", minversion="77")
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("dist")
    for name in ("pyproject.toml", "README.md", "LICENSE", "mminfer", "kernels", "csrc", "training"):
        subprocess.run(["cp", "-r", "-P", str(ROOT / name), str(tree)], check=True)
    program = "import sys; from setuptools import build_meta; getattr(build_meta, sys.argv[1])(sys.argv[2])"
    for what in ("build_wheel", "build_sdist"):
        command = [sys.executable, "-c", program, what, str(out)]
        run = subprocess.run(command, cwd=tree, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stderr
    return out


@pytest.mark.slow
def test_the_wheel_has_the_sources(distributions):
    (wheel,) = distributions.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert sorted(n for n in names if "/csrc/" in n) == [f"mminfer_kernels/{n}" for n in WANTED]
    assert WANTED and not [n for n in names if n.startswith(("csrc", "kernels", "tests", "benchmarks"))]


@pytest.mark.slow
def test_the_wheel_has_the_bundled_model_and_nothing_that_made_it(distributions):
    (wheel,) = distributions.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {"mminfer/nano/checkpoint/model.safetensors", "mminfer/nano/README.md"} <= set(names)
    assert any(n.endswith(".dist-info/licenses/LICENSE") for n in names)
    assert not [n for n in names if n.startswith("training") or n.endswith((".jsonl", "results.json", "curves.png"))]


@pytest.mark.slow
def test_an_installed_wheel_finds_its_sources(distributions, tmp_path):
    """Also where the folder above has C++ sources of somebody else."""
    (wheel,) = distributions.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "project" / "vendor" / "installed")
    (tmp_path / "project" / "csrc" / "cpu").mkdir(parents=True)
    (tmp_path / "project" / "vendor" / "csrc" / "cpu").mkdir(parents=True)
    (tmp_path / "project" / "vendor" / "csrc" / "cpu" / "theirs.cpp").write_text("#error\n")
    folder = tmp_path / "project" / "vendor" / "installed"
    out, _ = finish(start(NAME, folder))
    assert out[0] == str(folder / "mminfer_kernels" / "csrc")
    assert out[1] == build.cached_path("baseline").name  # the same sources: the same library


@pytest.mark.slow
def test_the_sdist_has_the_sources(distributions):
    (sdist,) = distributions.glob("*.tar.gz")
    with tarfile.open(sdist) as tar:
        files = {m.name.split("/", 1)[1] for m in tar.getmembers() if m.isfile()}
    assert {f"kernels/mminfer_kernels/{n}" for n in WANTED} <= files


def test_a_checkout_links_to_its_sources():
    link = ROOT / "kernels" / "mminfer_kernels" / "csrc"
    assert link.is_symlink() and os.readlink(link) == "../../csrc"
    assert build.sources() == ROOT / "csrc"
