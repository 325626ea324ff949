"""The value tests of the ops run with the reference and with the native kernels; see `backend`."""

import pytest
import torch
from mminfer_kernels import build, dispatch
from mminfer_kernels.backends import cpu_takes


@pytest.fixture(scope="session")
def native():
    """Skips where there is no C++ library; a library that should be there and is not fails."""
    if cpu_takes(torch.empty(0)):
        return
    reason = build.status()
    if "no C++ compiler" in reason or "MMINFER_NATIVE=0" in reason:
        pytest.skip(reason)
    pytest.fail(reason)


@pytest.fixture(scope="module", params=["reference", "native"])
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
