"""Tensors that tests make, on a device: of `pytest --device cuda`, or on a GPU that is none (`pretended`).

Tests make tensors as they always do. What the listed folders make themselves, without a word about a device, is made
on the CPU, so that values are those of every other run, and moved. What the library makes stays where it makes it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from mminfer_kernels.backends import interpreted
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

TESTS = Path(__file__).parent
FOLDERS = ("kernels", "tokens", "cache", "positions", "operators", "forward")  # whose tests a device runs
HELPERS = ("tiny.py", "views.py", "by_head.py")  # that make tensors for them
# Files of tests that no other device than the CPU can run, and why; single tests are marked `cpu_only`.
NATIVE = ("native", "native_limits", "native_properties", "native_build", "build", "hostile", "sanitizers")
CPU_ONLY = {f"test_{name}": "the C++ kernels" for name in (*NATIVE, "packed_decode_step")}
CPU_ONLY |= {f"test_{name}": "compiled without a GPU" for name in ("aot", "cuda_compile", "cuda_templates")}
CPU_ONLY |= {
    "test_dispatch": "the registry, told of tensors on the CPU",
    "test_launching": "launches by the interpreter",
    "test_scratch": "memory of the references",
    "test_tracing": "torch.compile, which takes no mode of ours",
}
DEVICES = ("cpu", "cuda", "pretended")
_PLACES = tuple(str(TESTS / folder) + os.sep for folder in FOLDERS) + tuple(str(TESTS / file) for file in HELPERS)


class MadeByTests(TorchFunctionMode):
    """Moves what those folders make to a device."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device
        self._makers = _device_constructors()

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        made = func(*args, **kwargs)
        if func not in self._makers or kwargs.get("device") is not None or kwargs.get("out") is not None:
            return made
        return made.to(self._device) if sys._getframe(1).f_code.co_filename.startswith(_PLACES) else made


_entered = ExitStack()
_device = torch.device("cpu")


def begin(name: str) -> None:
    """From now on tests make tensors there; `end` ends it.

    Raises:
        pytest.UsageError: there is no GPU, or kernels are interpreted all the same.
    """
    global _device
    if name == "cpu":
        return
    if name == "pretended":
        from benchmarks.gpu.pretended import pretended_gpu

        _entered.enter_context(pretended_gpu())
    elif not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: torch finds no GPU here; --device pretended tries tests without one")
    elif interpreted():
        raise pytest.UsageError("--device cuda: TRITON_INTERPRET is set, so kernels would be interpreted: unset it")
    _device = torch.device("cuda", 0)
    _entered.enter_context(MadeByTests(_device))


def end() -> None:
    """Tests make tensors on the CPU."""
    global _device
    _entered.close()
    _device = torch.device("cpu")


def device() -> torch.device:
    """Where tests make tensors."""
    return _device


def on_device(model: Any) -> Any:
    """A model's weights where tests make tensors."""
    if _device.type == "cpu":
        return model
    if torch.cuda.is_available():
        return model.to(_device)
    from benchmarks.gpu.pretended import moved

    return moved(model)


def chosen(name: str, items: Iterable[pytest.Item]) -> tuple[list[pytest.Item], list[pytest.Item]]:
    """Of the tests those for the device, and those that are left out; what cannot run there is marked to be skipped."""
    if name == "cpu":
        return list(items), []
    taken: Mapping[bool, list[pytest.Item]] = {True: [], False: []}
    for item in items:
        taken[str(item.path).startswith(_PLACES)].append(item)
        mark = item.get_closest_marker("cpu_only")
        why = CPU_ONLY.get(item.path.stem) if mark is None else mark.args[0]
        if why is not None:
            item.add_marker(pytest.mark.skip(reason=f"of the CPU alone: {why}"))
    return taken[True], taken[False]
