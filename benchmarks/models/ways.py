"""Ways to decode, timed in turn: the unpatched host as its users run it, and ours.

The host's cache grows by default; or it is static, of a fixed length; or static with the host's `forward` under
torch.compile, as transformers' documentation of static caches says. As in its own `generate`, which compiles by itself
on accelerators alone, prompts stay uncompiled.
"""

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import mminfer_kernels
import torch
from torch._dynamo.exc import FailOnRecompileLimitHit
from transformers.generation.streamers import BaseStreamer

from benchmarks.common import quantiles
from mminfer import InferenceConfig, patched
from mminfer.errors import shortened

HOST, STATIC, COMPILED = "host", "host, static cache", "host, static cache, compiled"
OFF = InferenceConfig()


class Clock(BaseStreamer):
    """Notes when each token comes."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(1e3 * time.perf_counter())

    def end(self) -> None:
        """Nothing to do."""

    @property
    def token_ms(self) -> list[float]:
        """From one token to the next; the prompt and the first token come before."""
        return [b - a for a, b in zip(self.times[1:], self.times[2:], strict=False)]


class CompiledHost:
    """The host's `forward` under torch.compile, for calls of one new token.

    Args:
        model: the host.

    Attributes:
        compile_ms: time of the calls in which something was compiled, since `on` began.
    """

    def __init__(self, model: Any) -> None:
        self._model, self._plain, self._compiled = model, model.forward, torch.compile(model.forward)
        self.compile_ms = 0.0

    @contextmanager
    def on(self) -> Iterator["CompiledHost"]:
        """Puts it on the model for a while."""
        self.compile_ms = 0.0

        @functools.wraps(self._plain)  # generate reads its signature
        def forward(*args: Any, **kwargs: Any) -> Any:
            return self._call(*args, **kwargs)

        self._model.forward = forward
        try:
            yield self
        finally:
            del self._model.forward

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs["input_ids"].shape[1] > 1:
            return self._plain(*args, **kwargs)
        start, graphs = time.perf_counter(), _graphs()
        out = self._compiled(*args, **kwargs)
        if _graphs() != graphs:
            self.compile_ms += 1e3 * (time.perf_counter() - start)
        return out


def _graphs() -> int:
    """How many graphs torch has compiled so far."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@dataclass(frozen=True)
class Way:
    """One way to decode.

    Args:
        name: in the tables.
        on: what puts it on the model for a call.
        told: what the host's `generate` is told beside.
        compiles: whether the first call is to compile something.
    """

    name: str
    on: Callable[[], AbstractContextManager[Any]]
    told: dict[str, Any] = field(default_factory=dict)
    compiles: bool = False


def host_ways(model: Any, compile: bool) -> list[Way]:
    """The host's own; compiled on demand."""
    static = {"cache_implementation": "static"}
    ways = [Way(HOST, nullcontext), Way(STATIC, nullcontext, static)]
    return [*ways, Way(COMPILED, CompiledHost(model).on, static, compiles=True)] if compile else ways


def our_way(model: Any, name: str = "off", compile: bool = False) -> Way:
    """Ours with everything off."""
    return Way(name, lambda: patched(model, OFF, compile=compile), compiles=compile)


@dataclass
class Timed:
    """What one way took.

    Args:
        ms: what its calls returned.
        compile_ms: of its first use, apart from these.
        status: why there are none; "": nothing is wrong.
    """

    ms: list[float] = field(default_factory=list)
    compile_ms: float = 0.0
    status: str = ""

    @property
    def columns(self) -> dict[str, Any]:
        """p20_ms, median_ms and p80_ms; empty where it could not be timed."""
        found = {name: round(value, 3) for name, value in quantiles(self.ms).items()} if self.ms else {}
        return {name: found.get(name, "") for name in ("p20_ms", "median_ms", "p80_ms")}


def in_turn(ways: Sequence[Way], call: Callable[[Way], list[float]], repeats: int) -> dict[str, Timed]:
    """Calls in turn, so that drift moves all of them; the first round is a warm-up.

    A way that cannot be compiled here, since there is no C++ compiler or it fails, is told of and left out.

    Args:
        ways: what is called.
        call: times one call: milliseconds of whatever is compared.
        repeats: rounds that count.
    """
    mminfer_kernels.prepare("cpu")
    found = {way.name: Timed() for way in ways}
    for turn in range(repeats + 1):
        for way in ways:
            timed = found[way.name]
            if timed.status:
                continue
            try:
                with way.on() as made:
                    ms = call(way)
                    timed.compile_ms += getattr(made, "compile_ms", 0.0)
            except (RuntimeError, FailOnRecompileLimitHit) as error:  # what torch's compilers raise
                if not way.compiles or turn:
                    raise
                timed.status = f"not compiled: {type(error).__name__}: {_first_line(error)}"
                continue
            if way.compiles and not timed.compile_ms:
                timed.status = "not compiled: torch.compile gave up"
            elif turn:
                timed.ms += ms
    return found


def _first_line(error: Exception) -> str:
    return shortened(str(error).strip().partition("\n")[0])
