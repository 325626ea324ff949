"""What settings do to a prompt: how far they move the uncompressed model's own answer, and what they cost."""

from __future__ import annotations

import math
import time
from collections.abc import Collection
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from mminfer.bench.fidelity import Continuation
from mminfer.calibration.prompts import Prompt, turn_of
from mminfer.config import InferenceConfig
from mminfer.engine import Engine
from mminfer.errors import InputError, MminferError
from mminfer.forward.decode import Decoder
from mminfer.forward.kv_cache import CompressedCache
from mminfer.forward.prefill import PassOptions, prompt_pass
from mminfer.metrics.fidelity import kl_divergence
from mminfer.metrics.flops import prompt_flops
from mminfer.metrics.records import PromptRecord

TIMING_MS = 200.0  # of the uncompressed model, while settings are timed beside it
LEAST_RUNS, MOST_RUNS = 3, 20  # of each
REFUSED = math.inf  # the loss of settings that a prompt cannot be read with


@dataclass(frozen=True)
class Outcome:
    """Settings on one prompt.

    Args:
        kl: KL(full || compressed) in nats, mean over the answer's tokens.
        flops: of the language model on the prompt, techniques included.
        cache_bytes: keys and values held behind the prompt.
        prompt_ms: of the prompt passes, on this machine.
        layer_rows: rows that entered each layer, in all passes.
    """

    kl: float
    flops: int
    cache_bytes: int
    prompt_ms: float
    layer_rows: tuple[int, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Outcome:
        return cls(**{**data, "layer_rows": tuple(data["layer_rows"])})

    @classmethod
    def refused(cls) -> Outcome:
        """Of settings that refuse the prompt."""
        return cls(REFUSED, 0, 0, 0.0, ())


@dataclass(eq=False)
class _Read:
    """A prompt in the cache.

    Args:
        cache: what is held.
        logits: [1, 1, vocabulary], of the last token.
        records: of each pass.
        ms: of all passes.
    """

    cache: CompressedCache
    logits: Tensor
    records: list[PromptRecord]
    ms: float


def answer_of(
    engine: Engine, config: InferenceConfig, prompt: Prompt, tokens: int, end_ids: Collection[int]
) -> tuple[Continuation, Outcome]:
    """The greedy answer of settings that lose nothing, and what it took.

    Args:
        engine: of the model.
        config: positions alone.
        prompt: what is asked.
        tokens: of the answer at most.
        end_ids: tokens that end a turn; the first one is the answer's last.

    Raises:
        InputError: the model gives numbers that are none.
    """
    with turn_of(engine):
        read, decoder = _read(engine, config, prompt), Decoder(engine.adapter, config)
        said: list[int] = []
        logits = [read.logits[0, 0]]
        while True:
            if bool(logits[-1].isnan().any()):
                raise InputError(
                    f"the uncompressed model answers nan behind {len(said)} tokens: nothing can be compared with that; "
                    "look at its weights, or load it in another dtype"
                )
            said.append(int(logits[-1].argmax()))
            if len(said) == tokens or said[-1] in end_ids:
                break
            logits.append(_step(engine, decoder, said[-1], read.cache))
        return Continuation(said, torch.stack(logits)), _outcome(engine, read, 0.0)


def outcome_of(engine: Engine, config: InferenceConfig, prompt: Prompt, answer: Continuation) -> Outcome:
    """Reads a prompt with these settings, and forces the answer upon them."""
    with turn_of(engine):
        try:
            read = _read(engine, config, prompt)
        except MminferError:
            return Outcome.refused()
        decoder = Decoder(engine.adapter, config)
        logits = [read.logits[0, 0]]
        for token in answer.token_ids[:-1]:
            logits.append(_step(engine, decoder, token, read.cache))
        return _outcome(engine, read, loss(answer.logits, torch.stack(logits)))


def loss(full: Tensor, found: Tensor) -> float:
    """Mean KL of [n, vocabulary]; infinite where it is no number."""
    kl = kl_divergence(full, found).mean().item()
    return kl if math.isfinite(kl) else REFUSED


def _read(engine: Engine, config: InferenceConfig, prompt: Prompt) -> _Read:
    cache, records = CompressedCache(), []
    cache.headroom = 0
    ms = 0.0
    for stretch in prompt.stretches:
        options = PassOptions(len(stretch.layout), last_only=True)
        wait_for(engine.device)
        start = time.perf_counter()
        output = prompt_pass(engine.adapter, config, stretch.embeds, stretch.layout, cache, options)
        wait_for(engine.device)
        ms += 1e3 * (time.perf_counter() - start)
        records.append(output.record)
    return _Read(cache, engine.adapter.logits(output.last[:, None]), records, ms)


def _step(engine: Engine, decoder: Decoder, token: int, cache: CompressedCache) -> Tensor:
    """[vocabulary] behind one more token."""
    ids = torch.tensor([[token]], device=engine.device)
    embeds = engine.adapter.entering(engine.model.get_input_embeddings()(ids))
    return decoder.step(embeds, cache)[0, 0]


def _outcome(engine: Engine, read: _Read, kl: float) -> Outcome:
    spec, size = engine.adapter.spec, engine.model.dtype.itemsize
    held = sum(layer.cache_bytes(spec.head_dim, size) for layer in read.records[-1].layers)
    rows = zip(*([sum(layer.rows) for layer in record.layers] for record in read.records), strict=True)
    flops = sum(prompt_flops(spec, record) for record in read.records)
    return Outcome(kl, flops, held, read.ms, tuple(map(sum, rows)))


def wait_for(device: torch.device) -> None:
    """Until the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed_ratio(engine: Engine, config: InferenceConfig, off: InferenceConfig, prompt: Prompt, share: float) -> float:
    """Time of the prompt passes under settings, as a fraction of the uncompressed model's; the shortest of each.

    Both run in turn, a few times, or more often where that is soon done: a machine is never quite at rest.

    Args:
        engine: of the model.
        config: the settings.
        off: those that lose nothing.
        prompt: what is read.
        share: of `TIMING_MS`, what may be spent.
    """
    taken: dict[bool, list[float]] = {False: [], True: []}
    while len(taken[True]) < LEAST_RUNS or (sum(taken[True]) < share * TIMING_MS and len(taken[True]) < MOST_RUNS):
        for is_off in (False, True):
            with turn_of(engine):
                taken[is_off].append(_read(engine, off if is_off else config, prompt).ms)
    return min(taken[False][1:]) / min(taken[True][1:])
