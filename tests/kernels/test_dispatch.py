import threading

import mminfer_kernels
import pytest
import torch
from mminfer_kernels import (
    BackendError,
    available_backends,
    backend_for,
    backends_used,
    dispatch,
    record_backends,
)


@pytest.fixture
def registry(monkeypatch):
    """A registry of its own, so that what a test registers is gone after it."""
    monkeypatch.setattr(dispatch, "_registry", {})
    monkeypatch.setattr(dispatch, "_last_used", {})
    monkeypatch.setattr(dispatch, "_passed_over", set())


def on_cuda(*tensors):
    return all(tensor.is_cuda for tensor in tensors)


def test_every_op_has_a_reference():
    assert {"column_mass", "power_iterate", "best_match", "merge_rows"} <= set(mminfer_kernels.OPS)
    assert all("reference" in available_backends(op) for op in mminfer_kernels.OPS)


def test_auto_prefers_native_then_triton(registry):
    dispatch.register("op", "reference", lambda: "r")
    dispatch.register("op", "triton", lambda: "t")
    assert dispatch.resolve("op", "auto")[0] == "triton"
    dispatch.register("op", "native", lambda: "n")
    name, function = dispatch.resolve("op", "auto")
    assert (name, function()) == ("native", "n")
    assert available_backends("op") == ("native", "triton", "reference")


def test_auto_falls_back_on_tensors_a_backend_cannot_take(registry, caplog):
    dispatch.register("op", "triton", lambda: "t", supports=on_cuda)
    dispatch.register("op", "reference", lambda: "r")
    with caplog.at_level("INFO", logger="mminfer_kernels.dispatch"):
        for _ in range(3):
            assert dispatch.resolve("op", "auto", torch.zeros(2))[0] == "reference"
    assert len(caplog.records) == 1
    assert backend_for("op", torch.zeros(2)) == "reference"
    with pytest.raises(BackendError, match=r"triton.*cannot take torch.float32 \[2\] on cpu"):
        dispatch.resolve("op", "triton", torch.zeros(2))


def test_an_explicit_backend_that_is_not_there_is_an_error(registry):
    dispatch.register("op", "reference", lambda: "r")
    with pytest.raises(BackendError, match="op: backend 'native' was asked for; available here: reference"):
        dispatch.resolve("op", "native")
    with pytest.raises(BackendError, match="unknown backend 'cuda'"):
        dispatch.resolve("op", "cuda")
    with pytest.raises(BackendError, match="unknown backend 'cuda'"):
        dispatch.register("op", "cuda", lambda: "c")
    with pytest.raises(BackendError, match="no backend takes"):
        dispatch.resolve("other", "auto")


def test_public_ops_pass_the_backend_on():
    x = torch.randn(4, 8)
    with pytest.raises(BackendError):
        mminfer_kernels.best_match(x, x, backend="nonsense")
    mminfer_kernels.best_match(x, x, backend="reference")
    assert backends_used()["best_match"] == "reference"


def test_recording_nests_and_ends():
    x = torch.randn(4, 8)
    with record_backends() as outer:
        mminfer_kernels.best_match(x, x, backend="reference")
        with record_backends() as inner:
            mminfer_kernels.gather_rows(x, torch.tensor([1]), backend="reference")
    mminfer_kernels.add_rows(x, torch.tensor([0]), x[:1], backend="reference")
    assert inner == {"gather_rows": "reference"}
    assert outer == {"best_match": "reference", "gather_rows": "reference"}


def test_recording_is_of_one_thread():
    x = torch.randn(4, 8)
    with record_backends() as record:
        thread = threading.Thread(target=mminfer_kernels.best_match, args=(x, x))
        thread.start()
        thread.join()
    assert record == {}
