"""Which implementation of an op runs: a registry by backend name, and a record of what ran."""

import functools
import importlib
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch

logger = logging.getLogger(__name__)

BACKENDS = ("native", "triton", "reference")  # the order in which "auto" prefers them


class BackendError(RuntimeError):
    """The backend asked for does not exist, is not installed, or cannot take these tensors."""


@dataclass(frozen=True)
class Implementation:
    """One backend's version of an op.

    Args:
        source: the function, or "module:name" of it, loaded when it first runs.
        supports: whether it can take the call's tensors; None: always.
        preferred: whether "auto" may take it for these tensors, where it can; None: always.
    """

    source: Callable[..., Any] | str
    supports: Callable[..., bool] | None = None
    preferred: Callable[..., bool] | None = None

    @functools.cached_property
    def function(self) -> Callable[..., Any]:
        if not isinstance(self.source, str):
            return self.source
        module, _, name = self.source.partition(":")
        return getattr(importlib.import_module(module), name)

    def takes(self, tensors: tuple[torch.Tensor, ...]) -> bool:
        return self.supports is None or self.supports(*tensors)

    def suits(self, tensors: tuple[torch.Tensor, ...], assumed: bool = False) -> bool:
        """Whether "auto" may run it on these tensors; if it is assumed to take them, only whether that is preferred."""
        return (self.preferred is None or self.preferred(*tensors)) and (assumed or self.takes(tensors))


_registry: dict[str, dict[str, Implementation]] = {}
_last_used: dict[str, str] = {}
_passed_over: set[tuple[str, str]] = set()
_recording: ContextVar[dict[str, str] | None] = ContextVar("mminfer_kernels_recording", default=None)


def register(
    op: str,
    backend: str,
    source: Callable[..., Any] | str,
    supports: Callable[..., bool] | None = None,
    preferred: Callable[..., bool] | None = None,
) -> None:
    """Make a function the `backend` implementation of `op`.

    Args:
        op: name of the public op.
        backend: one of `BACKENDS`.
        source: called with exactly the arguments the op's reference takes; or "module:name", imported when first
            run, so that nothing is compiled and no optional package loaded before.
        supports: told the op's tensors, says whether this implementation can take them; None means always.
        preferred: likewise, says whether "auto" may choose it; None means wherever it can.

    Raises:
        BackendError: `backend` is not a known name.
    """
    if backend not in BACKENDS:
        raise BackendError(f"unknown backend {backend!r} for {op}; known backends: {', '.join(BACKENDS)}")
    _registry.setdefault(op, {})[backend] = Implementation(source, supports, preferred)


def registered_ops() -> tuple[str, ...]:
    """Names of all ops, in alphabetical order."""
    return tuple(sorted(_registry))


def available_backends(op: str) -> tuple[str, ...]:
    """Backends registered for `op` on this machine, the preferred one first."""
    registered = _registry.get(op, {})
    return tuple(name for name in BACKENDS if name in registered)


def backend_for(op: str, *tensors: torch.Tensor, assumed: str | None = None) -> str:
    """Name of the backend that "auto" would run `op` with, given these tensors.

    Args:
        op: name of the public op.
        tensors: the op's tensors.
        assumed: a backend that is taken for able to run on them, and not asked.
    """
    return _select(op, tensors, assumed)


def resolve(op: str, backend: str, *tensors: torch.Tensor) -> tuple[str, Callable[..., Any]]:
    """Pick the implementation to run and record the choice.

    Args:
        op: name of the public op.
        backend: "auto" or one of `BACKENDS`.
        tensors: the op's tensors, shown to each candidate's `supports`.

    Returns:
        The backend's name and its function.

    Raises:
        BackendError: the name is unknown, or that backend is not registered or cannot take these tensors.
    """
    name = _select(op, tensors) if backend == "auto" else _require(op, backend, tensors)
    note_backend(op, name)
    return name, _registry[op][name].function


def note_backend(op: str, name: str) -> None:
    """Record that `op` runs with `name`: for what a library outside this package computes."""
    _last_used[op] = name
    recording = _recording.get()
    if recording is not None:
        recording[op] = name


def backends_used() -> dict[str, str]:
    """The backend each op last ran with in this process."""
    return dict(_last_used)


@contextmanager
def record_backends() -> Iterator[dict[str, str]]:
    """Yield a dict that fills with op -> backend for every op run inside, in this thread or task only."""
    outer = _recording.get()
    record: dict[str, str] = {}
    token = _recording.set(record)
    try:
        yield record
    finally:
        _recording.reset(token)
        if outer is not None:
            outer.update(record)


def _select(op: str, tensors: tuple[torch.Tensor, ...], assumed: str | None = None) -> str:
    registered = _registry.get(op, {})
    for name in BACKENDS:
        implementation = registered.get(name)
        if implementation is None:
            continue
        if implementation.suits(tensors, name == assumed):
            return name
        if (op, name) not in _passed_over:
            _passed_over.add((op, name))
            logger.info("%s: %s cannot take %s, falling back", op, name, _describe(tensors))
    raise BackendError(f"{op}: no backend takes {_describe(tensors)}; available: {_listing(op)}")


def _require(op: str, backend: str, tensors: tuple[torch.Tensor, ...]) -> str:
    if backend not in BACKENDS:
        raise BackendError(f"{op}: unknown backend {backend!r}; known: auto, {', '.join(BACKENDS)}")
    implementation = _registry.get(op, {}).get(backend)
    if implementation is None:
        raise BackendError(f"{op}: backend {backend!r} was asked for; available here: {_listing(op)}")
    if not implementation.takes(tensors):
        raise BackendError(
            f"{op}: backend {backend!r} cannot take {_describe(tensors)}; available here: {_listing(op)}"
        )
    return backend


def _listing(op: str) -> str:
    return ", ".join(available_backends(op)) or "none"


def _describe(tensors: tuple[torch.Tensor, ...]) -> str:
    return "; ".join(f"{t.dtype} {list(t.shape)} on {t.device}" for t in tensors)
