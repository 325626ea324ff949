"""Time and memory of answers, stage by stage: the unpatched host and settings of ours, in turn in one process."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import LogitsProcessor, LogitsProcessorList

from mminfer.config import InferenceConfig
from mminfer.engine import Engine
from mminfer.forward.native_build import prepare_kernels
from mminfer.inputs.progress import PROGRESS
from mminfer.metrics.flops import full_prompt_flops, prompt_flops
from mminfer.metrics.memory import bytes_in_use, full_cache_bytes, give_back_freed, peak_memory
from mminfer.metrics.records import PromptRecord
from mminfer.models.vision import PIXEL_INPUTS
from mminfer.patching import patched

HOST = "host"
STAGES = ("prepare_ms", "vision_ms", "prompt_ms", "ttft_ms", "tpot_ms")
QUANTILES = {"p20": 20, "p50": 50, "p80": 80}


@dataclass(frozen=True)
class Run:
    """One call.

    Args:
        prepare_ms: the processor: text and pixels.
        vision_ms: vision tower and projector.
        prompt_ms: the rest of the time to the first token: the language model's prompt pass, techniques included.
        ttft_ms: the sum of the three.
        token_ms: from one token to the next.
        peak_bytes: highest memory in use during the call.
        steady_bytes: memory in use at the last token.
        record: what the prompt pass did; None of the unpatched host.
    """

    prepare_ms: float
    vision_ms: float
    prompt_ms: float
    ttft_ms: float
    token_ms: tuple[float, ...]
    peak_bytes: int
    steady_bytes: int
    record: PromptRecord | None


@dataclass
class SpeedRow:
    """One setting over all its runs; times are quantiles over runs, of decoding over tokens.

    Args:
        setting: its name; "host" is the unpatched model.
        batch: chats in a call.
        prompt_tokens: of all of them.
        new_tokens: of each of them.
        repeats: calls that were counted.
        warmup_ms: time to the first token of the call before these.
        times: name and quantile -> milliseconds, such as "ttft_ms_p50".
        tokens_per_s: of decoding, of the whole batch, at the median.
        peak_bytes: highest memory in use during a call, median.
        steady_bytes: memory in use at the last token, median.
        cache_bytes: keys and values held behind the prompt.
        prompt_gflop: the language model's work on the prompt.
        prompt_speedup: the host's median prompt pass over this one's.
        ttft_speedup: likewise, to the first token.
        tpot_speedup: likewise, of a decoded token.
    """

    setting: str
    batch: int
    prompt_tokens: int
    new_tokens: int
    repeats: int
    warmup_ms: float
    times: dict[str, float]
    tokens_per_s: float
    peak_bytes: int
    steady_bytes: int
    cache_bytes: int
    prompt_gflop: float
    prompt_speedup: float = field(default=float("nan"))
    ttft_speedup: float = field(default=float("nan"))
    tpot_speedup: float = field(default=float("nan"))

    def to_dict(self) -> dict[str, Any]:
        """Flat, for a table of rows."""
        flat = {name: value for name, value in vars(self).items() if name != "times"}
        return {name: round(value, 4) if isinstance(value, float) else value for name, value in flat.items()} | {
            name: round(value, 3) for name, value in self.times.items()
        }


class _Clock(LogitsProcessor):
    """Notes when the logits of each token are there, and what memory is in use at the last of them."""

    def __init__(self, device: torch.device, tokens: int) -> None:
        self._device, self._tokens = device, tokens
        self.at: list[float] = []
        self.bytes = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        _wait(self._device)
        self.at.append(time.perf_counter())
        if len(self.at) == self._tokens:  # reading it takes a part of a token's time
            self.bytes = bytes_in_use(self._device)
        return scores


def measure(
    engine: Engine,
    settings: Mapping[str, InferenceConfig],
    chats: Sequence[Any],
    new_tokens: int,
    repeats: int,
) -> list[SpeedRow]:
    """Host and settings answer the same chats in turn, so that a drifting machine moves all of them.

    Args:
        engine: model and processor; its own config does not matter.
        settings: by name.
        chats: one batch.
        new_tokens: tokens that each chat gets, two or more.
        repeats: counted calls of each; one more before them warms up.
    """
    prepare_kernels(engine.device)
    doors: dict[str, InferenceConfig | None] = {HOST: None, **settings}
    runs: dict[str, list[Run]] = {name: [] for name in doors}
    with tqdm(total=(repeats + 1) * len(doors), desc="timing", unit="call", **PROGRESS) as bar:
        for _ in range(repeats + 1):
            for name, config in doors.items():
                runs[name].append(_run(engine, config, chats, new_tokens))
                bar.update()
    prompt = next(run.record for run in runs[next(iter(settings))] if run.record is not None)
    rows = [_row(engine, name, own, prompt, new_tokens) for name, own in runs.items()]
    for row in rows:
        for stage in ("prompt", "ttft", "tpot"):
            ratio = rows[0].times[f"{stage}_ms_p50"] / row.times[f"{stage}_ms_p50"]
            setattr(row, f"{stage}_speedup", ratio)
    return rows


def _run(engine: Engine, config: InferenceConfig | None, chats: Sequence[Any], new_tokens: int) -> Run:
    device, model = engine.device, engine.model
    give_back_freed()
    clock = _Clock(device, new_tokens)
    door = nullcontext() if config is None else patched(model, config)
    with door as handle, _vision_timed(engine) as vision, peak_memory(device) as peak:
        _wait(device)
        start = time.perf_counter()
        inputs = engine.prepare(chats)
        _wait(device)
        prepared = time.perf_counter()
        model.generate(
            **inputs,
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            num_beams=1,
            logits_processor=LogitsProcessorList([clock]),
        )
    ttft_ms, prepare_ms = 1e3 * (clock.at[0] - start), 1e3 * (prepared - start)
    return Run(
        prepare_ms=prepare_ms,
        vision_ms=vision.ms,
        prompt_ms=ttft_ms - prepare_ms - vision.ms,
        ttft_ms=ttft_ms,
        token_ms=tuple(1e3 * (b - a) for a, b in zip(clock.at, clock.at[1:], strict=False)),
        peak_bytes=peak.bytes,
        steady_bytes=clock.bytes,
        record=None if handle is None else handle.records[-1],
    )


@dataclass
class _Span:
    ms: float = 0.0
    depth: int = 0  # one encoder may call the other


@contextmanager
def _vision_timed(engine: Engine) -> Iterator[_Span]:
    """Adds up the time in the host's own encoders of images and videos, through which both doors go."""
    base, device, span = engine.adapter.base, engine.device, _Span()
    names = [name for kind in PIXEL_INPUTS if hasattr(base, name := f"get_{kind.name.lower()}_features")]
    own = {name: vars(base)[name] for name in names if name in vars(base)}
    for name in names:
        setattr(base, name, _timed(getattr(base, name), span, device))
    try:
        yield span
    finally:
        for name in names:
            delattr(base, name)
        for name, function in own.items():
            setattr(base, name, function)


def _timed(function: Callable[..., Any], span: _Span, device: torch.device) -> Callable[..., Any]:
    @functools.wraps(function)
    def timed(*args: Any, **kwargs: Any) -> Any:
        _wait(device)
        start, span.depth = time.perf_counter(), span.depth + 1
        try:
            return function(*args, **kwargs)
        finally:
            _wait(device)
            span.depth -= 1
            if span.depth == 0:
                span.ms += 1e3 * (time.perf_counter() - start)

    return timed


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _row(engine: Engine, name: str, runs: Sequence[Run], prompt: PromptRecord, new_tokens: int) -> SpeedRow:
    spec, element_size = engine.adapter.spec, engine.model.dtype.itemsize
    warmup, *counted = runs
    times: dict[str, float] = {}
    for stage in STAGES:
        values = [getattr(run, stage) for run in counted] if stage != "tpot_ms" else _tokens_of(counted)
        times |= {f"{stage}_{label}": _quantile(values, percent) for label, percent in QUANTILES.items()}
    record = counted[0].record
    if record is None:
        held = full_cache_bytes(spec, prompt.prompt, element_size)
        flops = full_prompt_flops(spec, prompt.prompt, prompt.past, prompt.pairs_ahead)
    else:
        held = sum(layer.cache_bytes(spec.head_dim, element_size) for layer in record.layers)
        flops = prompt_flops(spec, record)
    batch = len(prompt.prompt)
    return SpeedRow(
        setting=name,
        batch=batch,
        prompt_tokens=sum(prompt.prompt),
        new_tokens=new_tokens,
        repeats=len(counted),
        warmup_ms=warmup.ttft_ms,
        times=times,
        tokens_per_s=1e3 * batch / times["tpot_ms_p50"],
        peak_bytes=round(statistics.median(run.peak_bytes for run in counted)),
        steady_bytes=round(statistics.median(run.steady_bytes for run in counted)),
        cache_bytes=held,
        prompt_gflop=flops / 1e9,
    )


def _tokens_of(runs: Sequence[Run]) -> list[float]:
    return [ms for run in runs for ms in run.token_ms]


def _quantile(values: Sequence[float], percent: int) -> float:
    return float(torch.tensor(values, dtype=torch.float64).quantile(percent / 100))
