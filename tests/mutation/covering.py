"""Which tests enter which functions: no other test can find a fault there."""

import ast
import json
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import CodeType, FrameType
from typing import NamedTuple

import pytest


class Covered(NamedTuple):
    """What one test entered.

    Args:
        test: its id.
        cpu_s: how long it took.
        functions: "cache/digest.py:112", by the line where each begins.
    """

    test: str
    cpu_s: float
    functions: frozenset[str]


class Watching:
    """Takes down what each test enters of a package, as a plugin of pytest's.

    What is set up for several tests of a file counts for all of them.
    """

    def __init__(self, package: Path) -> None:
        self._package, self._now = f"{package}/", set[str]()
        self._found: dict[str, tuple[float, set[str]]] = {}
        self._set_up: dict[str, set[str]] = {}  # by file
        self._known: dict[int, CodeType] = {}  # since the last test
        threading.settrace(self._entered)

    def _entered(self, frame: FrameType, *_: object) -> None:
        code = frame.f_code
        if id(code) in self._known:
            return
        self._known[id(code)] = code
        if code.co_filename.startswith(self._package):
            self._now.add(f"{code.co_filename.removeprefix(self._package)}:{code.co_firstlineno}")

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self._begin()
        return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Iterator[None]:
        self._set_up.setdefault(str(item.path), set()).update(self._now)
        self._begin()
        result = yield
        self._found[item.nodeid] = (0.0, self._now)
        return result

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call":
            self._found[report.nodeid] = (report.duration, self._found.get(report.nodeid, (0.0, set()))[1])

    def _begin(self) -> None:
        self._now, self._known = set(), {}
        sys.settrace(self._entered)  # tests that trace took it away

    def write(self, file: Path, root: Path) -> None:
        rows = []
        for test, (cpu_s, own) in self._found.items():
            own = own | self._set_up.get(str(root / test.partition("::")[0]), set())
            rows.append((test, cpu_s, sorted(own)))
        file.write_text(json.dumps(rows))


def read(file: Path) -> list[Covered]:
    return [Covered(test, cpu_s, frozenset(functions)) for test, cpu_s, functions in json.loads(file.read_text())]


def function_at(source: str, line: int) -> int | None:
    """The line at which the innermost function begins whose body has a line; None: it runs where the module loads."""
    begins = None
    for node in ast.walk(ast.parse(source)):  # outer ones first
        is_function = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        if is_function and node.body[0].lineno <= line <= (node.end_lineno or 0):
            begins = min(x.lineno for x in (node, *node.decorator_list))
    return begins


def that_may_find(covered: Sequence[Covered], place: str, source: str) -> list[str]:
    """Ids of the tests that can find a fault, by file: files named after the module first, then those soonest done.

    Args:
        covered: what each test entered.
        place: of the fault, "cache/digest.py:112:8".
        source: of its module.
    """
    name, line = place.split(":")[:2]
    begins = function_at(source, int(line))
    chosen = [c for c in covered if begins is None or f"{name}:{begins}" in c.functions] or list(covered)
    takes: dict[str, float] = {}
    for test, cpu_s, _ in chosen:
        takes[file_of(test)] = takes.get(file_of(test), 0.0) + cpu_s

    def rank(file: str) -> tuple[bool, float, str]:
        named = Path(name).stem.startswith(Path(file).stem.removeprefix("test_"))
        return not named, takes[file], file

    return [c.test for c in sorted(chosen, key=lambda c: rank(file_of(c.test)))]


def file_of(test: str) -> str:
    return test.partition("::")[0]


class Only:
    """Leaves out all tests but these, as a plugin of pytest's."""

    def __init__(self, tests: Sequence[str]) -> None:
        self._tests = frozenset(tests)

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = [item for item in items if item.nodeid in self._tests]
