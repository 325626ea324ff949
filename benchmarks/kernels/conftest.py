"""Options and fixtures of the suite in `test_ops`."""

from collections.abc import Iterator

import pytest
import torch

from benchmarks.kernels.call import Call
from benchmarks.kernels.cases import CASES, case_named
from benchmarks.kernels.compiled import Compilation, fresh_cache, try_compiling
from benchmarks.machine import Peak, measured_peak

RUNS = ("reference", "compiled", "native", "triton")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("ops")
    group.addoption("--quick", action="store_true", help="small sizes, for trying")
    group.addoption("--compile-limit", type=float, default=120, help="seconds for compiling one reference")
    group.addoption("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    group.addoption("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        names = [case.name(metafunc.config.getoption("quick")) for case in CASES]
        metafunc.parametrize("case", names, scope="module")
        metafunc.parametrize("run", RUNS)


@pytest.fixture(scope="session")
def peak(pytestconfig: pytest.Config) -> Peak:
    """Of the device, in the dtype of the run."""
    option = pytestconfig.getoption
    return measured_peak(option("device"), getattr(torch, option("dtype")), option("quick"))


@pytest.fixture(scope="module")
def call(case: str, pytestconfig: pytest.Config) -> Call:
    """The case's, shared by its runs."""
    torch.manual_seed(0)
    option, quick = pytestconfig.getoption, pytestconfig.getoption("quick")
    return case_named(case, quick).build(quick, option("device"), getattr(torch, option("dtype")))


@pytest.fixture(scope="session")
def generated_code() -> Iterator[None]:
    with fresh_cache():
        yield


@pytest.fixture
def compilation(case: str, run: str, pytestconfig: pytest.Config, request: pytest.FixtureRequest) -> Compilation | None:
    """What compiling the case's reference gave; None for other runs."""
    if run != "compiled":
        return None
    request.getfixturevalue("generated_code")
    option = pytestconfig.getoption
    return try_compiling(case, option("compile_limit"), option("quick"), option("device"), option("dtype"))
