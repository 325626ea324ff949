"""The value tests of the ops run with the reference and with the kernels of the device; see `backend`."""

import pytest
import torch
from mminfer_kernels import build, dispatch
from mminfer_kernels.backends import cpu_takes

from tests.device import device


def pytest_generate_tests(metafunc):
    """The backends of `backend`: beside the reference the CPU's kernels, or a GPU's."""
    own = [x for x in metafunc.definition.iter_markers("parametrize") if "backend" in x.args[0]]
    if "backend" in metafunc.fixturenames and not own:
        kernels = "native" if device().type == "cpu" else "triton"
        metafunc.parametrize("backend", ["reference", kernels], indirect=True, scope="module")


@pytest.fixture(scope="session")
def native():
    """Skips where there is no C++ library; a library that should be there and is not fails."""
    if device().type != "cpu":
        pytest.skip("of the CPU alone: the C++ kernels")
    if cpu_takes(torch.empty(0)):
        return
    reason = build.status()
    if "no C++ compiler" in reason or "MMINFER_NATIVE=0" in reason:
        pytest.skip(reason)
    pytest.fail(reason)


@pytest.fixture(scope="module")
def backend(request):
    """What "auto" prefers in this module: for native, float64 still goes to the reference."""
    if request.param == "native":
        request.getfixturevalue("native")
    with pytest.MonkeyPatch.context() as patch:
        order = sorted(dispatch.BACKENDS, key=lambda name: (name != request.param, name != "reference"))
        patch.setattr(dispatch, "BACKENDS", tuple(order))
        yield request.param


@pytest.fixture(params=tuple(build.ISA_FLAGS))
def isa(request, monkeypatch, native):
    """Each instruction set that this processor runs, as what the native kernels are built for."""
    if request.param not in build.runnable_isas():
        pytest.skip(f"this processor does not run {request.param}")
    monkeypatch.setenv("MMINFER_ISA", request.param)
    assert build.library() is not None, build.status()
    return request.param
