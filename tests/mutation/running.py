"""Mutants of the rooms whose sums must be right, and which of them the tests find out.

    python -m tests.mutation --each 10
    python -m tests.mutation --rooms tokens,cache --each 40 --seed 7
    python -m tests.mutation --at tokens/prune.py:92

A mutant is killed by a test of its room that fails, or that takes far longer than before. Tests that never enter the
function that is broken are left out. The same numbers and seed draw the same mutants. One process at a time: what is
heavy is loaded once, each mutant lives in a fork.
"""

import argparse
import ast
import importlib
import importlib.abc
import importlib.machinery
import json
import os
import random
import resource
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from tests.mutation import covering
from tests.mutation.covering import Covered
from tests.mutation.mutants import Mutant, mutants_of

ROOT = Path(__file__).parents[2]
# The tests of each room.
ROOMS = {
    "tokens": ("tokens", "test_layout.py", "technique", "metrics", "test_config.py", "test_golden.py"),
    "cache": ("cache", "technique", "metrics", "forward/test_replay.py", "test_config.py", "test_golden.py"),
    "positions": ("positions", "test_config.py", "test_golden.py"),
    "operators": ("operators", "technique/test_bounds.py", "test_config.py"),
    "forward": ("forward",),
}
OURS = ("mminfer", "mminfer_kernels", "tests", "conftest", "benchmarks", "_pytest", "__main__")
BROKEN, NONE_FOUND = 99, 5  # exit codes: ours, and pytest's where there was no test to run
PATIENCE = 4  # times the processor time of the tests without a fault, before a mutant counts as hung


class Ended(NamedTuple):
    """How a run of the tests ended.

    Args:
        status: "passed", "killed" or "hung".
        cpu_s: processor time.
        told: the last lines that it wrote.
    """

    status: str
    cpu_s: float
    told: str


def main() -> None:
    options = _options().parse_args()
    os.environ |= {"TRITON_INTERPRET": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    totals: Counter[str] = Counter()
    for room in options.rooms.split(",") if not options.at else [options.at.partition("/")[0]]:
        totals += _run_room(room, drawn(room, options.each, options.seed, options.at))
    print(f"all: {_summary(totals)}")
    sys.exit(totals["survived"] > 0)


def _options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rooms", default=",".join(ROOMS), help="The folders of mminfer to break, with commas.")
    parser.add_argument("--each", type=int, default=10, help="How many mutants are drawn of each room.")
    parser.add_argument("--seed", type=int, default=0, help="Another one draws other mutants.")
    parser.add_argument("--at", default="", help="All mutants of these lines or files of one room instead.")
    return parser


def drawn(room: str, count: int, seed: int, at: str = "") -> list[Mutant]:
    """Some mutants of a room, or all at a place; the same for the same numbers, in order of place."""
    files = [path for path in sorted((ROOT / "mminfer" / room).rglob("*.py")) if path.name != "__init__.py"]
    found = [m for f in files for m in mutants_of(f.read_text("utf-8"), f"{room}/{f.relative_to(f.parents[0])}")]
    if at:
        places = tuple(f"{place}:" for place in at.split(","))
        return [mutant for mutant in found if f"{mutant.place}:".startswith(places)]
    places = sorted(random.Random(f"{seed} {room}").sample(range(len(found)), min(count, len(found))))
    return [found[i] for i in places]


def _run_room(room: str, mutants: Sequence[Mutant]) -> Counter[str]:
    tests = [str(ROOT / "tests" / name) for name in ROOMS[room] if (ROOT / "tests" / name).exists()]
    with tempfile.TemporaryDirectory() as folder:
        before = _forked(lambda: _watched(tests, Path(folder)), None)
        if before.status != "passed":
            sys.exit(f"{room}: the tests fail without any fault:\n{before.told}")
        _preload(json.loads(Path(folder, "modules.json").read_text()))
        covered = covering.read(Path(folder, "covered.json"))
    limit_s = int(PATIENCE * before.cpu_s) + 10
    totals: Counter[str] = Counter()
    for mutant in mutants:
        ended = _forked(lambda mutant=mutant: _found_out(mutant, covered), limit_s)  # type: ignore[misc]
        status = "survived" if ended.status == "passed" else ended.status
        totals[status] += 1
        print(f"{status:8} {ended.cpu_s:5.1f} s  {mutant}", flush=True)
    print(f"{room}: {_summary(totals)}", flush=True)
    return totals


def _summary(totals: Counter[str]) -> str:
    made, killed = sum(totals.values()), totals["killed"] + totals["hung"]
    return f"{made} mutants, {killed} killed ({totals['hung']} by time), {totals['survived']} survived"


def _forked(work: Callable[[], int], limit_s: int | None) -> Ended:
    """Does some work in a fork.

    Args:
        work: gives 0 where all is well.
        limit_s: processor time after which the fork is ended; None: none.
    """
    with tempfile.TemporaryFile() as written:
        sys.stdout.flush()
        child = os.fork()
        if not child:
            _end_with(work, written.fileno(), limit_s)
        begun, ended = time.monotonic(), (0, 0, resource.struct_rusage([0] * 16))
        while not ended[0]:
            ended = os.wait4(child, os.WNOHANG)
            time.sleep(0.05)
            if limit_s is not None and time.monotonic() - begun > 60 * limit_s:  # waits for what never comes
                os.kill(child, 9)
        written.seek(0)
        told = written.read().decode(errors="replace")[-2000:]
    code, used = os.waitstatus_to_exitcode(ended[1]), ended[2]
    if code == BROKEN:
        sys.exit(f"the run itself failed:\n{told}")
    status = "passed" if code == 0 else "hung" if code < 0 else "killed"
    return Ended(status, used.ru_utime + used.ru_stime, told)


def _end_with(work: Callable[[], int], output: int, limit_s: int | None) -> None:
    """In the fork: never comes back."""
    code = BROKEN
    try:
        os.dup2(output, 1)
        os.dup2(output, 2)
        if limit_s is not None:
            used = int(sum(resource.getrusage(resource.RUSAGE_SELF)[:2]))
            resource.setrlimit(resource.RLIMIT_CPU, (used + limit_s, used + limit_s + 1))
        code = work()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _watched(tests: Sequence[str], folder: Path) -> int:
    """The tests over the package as it is; writes which modules were loaded, and what each test entered."""
    watching = covering.Watching(ROOT / "mminfer")
    code = _pytest(tests, watching)
    watching.write(folder / "covered.json", ROOT)
    names = [name for name in sys.modules if name.partition(".")[0] not in OURS]
    (folder / "modules.json").write_text(json.dumps(names))
    return code


def _found_out(mutant: Mutant, covered: Sequence[Covered]) -> int:
    """The tests that may find a mutant, over it: those of the likeliest file first."""
    sys.meta_path.insert(0, _Broken(mutant))
    tests = covering.that_may_find(covered, mutant.place, mutant.source)
    first = [test for test in tests if covering.file_of(test) == covering.file_of(tests[0])]
    for part in (first, tests[len(first) :]):
        files = list(dict.fromkeys(str(ROOT / covering.file_of(test)) for test in part))
        if files and (code := _pytest(files, covering.Only(part))):
            return BROKEN if code == NONE_FOUND else code
    return 0


def _pytest(tests: Sequence[str], plugin: object) -> int:
    import pytest

    os.environ["HYPOTHESIS_STORAGE_DIRECTORY"] = tempfile.mkdtemp()
    sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]
    options = ["-x", "-q", "-m", "not slow", "-p", "no:cacheprovider", "--hypothesis-seed=0", f"--rootdir={ROOT}"]
    return int(pytest.main([*options, *tests], plugins=[plugin]))


def _preload(names: Sequence[str]) -> None:
    """Loads what the tests loaded of other packages, so that forks need not."""
    for name in names:
        try:
            importlib.import_module(name)
        except Exception:  # a module that only its package can load
            continue


class _Broken(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Gives a mutant in place of its module."""

    def __init__(self, mutant: Mutant) -> None:
        self._file = ROOT / "mminfer" / mutant.place.partition(":")[0]
        self._name = ".".join(self._file.relative_to(ROOT).with_suffix("").parts)
        self._tree: ast.Module = mutant.tree

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self._name:
            return None
        spec = importlib.machinery.ModuleSpec(fullname, self, origin=str(self._file))
        spec.has_location = True
        return spec

    def exec_module(self, module: ModuleType) -> None:
        exec(compile(self._tree, str(self._file), "exec"), module.__dict__)
