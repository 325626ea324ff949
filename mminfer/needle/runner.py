"""Asks engines the questions of a protocol: the context in the prompt, or read and compressed first."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from tqdm import tqdm

from mminfer import nano
from mminfer.config import InferenceConfig
from mminfer.engine import Engine, check_before_loading
from mminfer.errors import ConfigError, InputError, UnsupportedModelError
from mminfer.forward.native_build import prepare_kernels
from mminfer.inputs.progress import PROGRESS
from mminfer.models.loading import Checkpoint
from mminfer.needle.protocol import NeedleProtocol, Question, Sample
from mminfer.needle.scores import Answer
from mminfer.output import GenerationOutput

BLIND = "blind"

Reply = tuple[Question, GenerationOutput, float, float | None]  # with its time and that of reading, both in ms


@dataclass(frozen=True)
class Asking:
    """How questions are put.

    Args:
        next_turn: the context is read and compressed first, and every question goes on from a copy; else it stands in
            the prompt of each question.
        blind: ask everything once more, nothing compressed, with the pictures left out.
        max_new_tokens: of an answer; None: what the protocol's format takes.
        prefill_chunk_size: tokens of a prompt that go through the model at a time; None: all.
    """

    next_turn: bool = False
    blind: bool = False
    max_new_tokens: int | None = None
    prefill_chunk_size: int | None = None


def load(
    model: str, settings: Mapping[str, InferenceConfig], device: str | None = None, dtype: str | None = None
) -> dict[str, Engine]:
    """An engine for every setting, over one model; all settings are checked before its weights are loaded.

    Args:
        model: checkpoint folder or hub name, or "nano".
        settings: by name, one or more.
        device: as for `Engine.from_pretrained`.
        dtype: as for `Engine.from_pretrained`.

    Raises:
        InputError: there is no such model.
        UnsupportedModelError: its family has no adapter.
        ConfigError: a setting does not fit it.
    """
    first, *others = settings.values()
    model_config = _model_config(model) if others else None
    for config in others if model_config is not None else ():
        check_before_loading(model_config, config)
    plain = Engine.from_pretrained(model, first, device, dtype)
    return {name: Engine(plain.model, plain.processor, config) for name, config in settings.items()}


def refusals(model: str, settings: Mapping[str, InferenceConfig]) -> dict[str, str]:
    """Why a model cannot take some of these settings, by their name; before its weights are loaded."""
    model_config, found = _model_config(model), {}
    for name, config in settings.items() if model_config is not None else ():
        try:
            check_before_loading(model_config, config)
        except ConfigError as error:
            found[name] = str(error)
    return found


def run(
    engines: Mapping[str, Engine],
    protocol: NeedleProtocol,
    images: Sequence[int],
    samples: int,
    seed: int,
    asking: Asking | None = None,
) -> list[Answer]:
    """Every engine answers the same questions over the same contexts.

    Args:
        engines: by name of their setting, all of one model.
        protocol: makes the contexts.
        images: lengths of contexts, in pictures.
        samples: contexts of a length, or of a length and depth.
        seed: of the contexts.
        asking: how questions are put.

    Raises:
        InputError: the protocol cannot make contexts of such a length.
    """
    asking = asking or Asking()
    for length in images:
        protocol.check(length)
    for engine in engines.values():
        prepare_kernels(engine.device)
    doors = dict(engines)
    if asking.blind:
        some = next(iter(engines.values()))
        doors[BLIND] = Engine(some.model, some.processor)
    answers: list[Answer] = []
    for length in images:
        contexts = protocol.samples(length, samples, seed)
        for sample in tqdm(contexts, f"{protocol.name}, {length} images", unit="context", **PROGRESS):
            for name, engine in doors.items():
                answers += _answers(name, engine, protocol, sample, asking)
    return answers


def _model_config(model: str) -> Any:
    """The host's configuration, or None where there is none: the engine says so better."""
    try:
        return Checkpoint(str(nano.checkpoint_path()) if model == nano.NANO else model).config()
    except (InputError, UnsupportedModelError):
        return None


def _answers(name: str, engine: Engine, protocol: NeedleProtocol, sample: Sample, asking: Asking) -> Iterator[Answer]:
    limit, chunk, blind = asking.max_new_tokens or protocol.max_new_tokens, asking.prefill_chunk_size, name == BLIND
    first = asking.next_turn and not blind
    replies = _next_turn(engine, sample, limit, chunk) if first else _in_prompt(engine, sample, limit, chunk, blind)
    for question, output, ms, read_ms in replies:
        stats = output.stats
        yield Answer(
            setting=name,
            images=sample.images,
            question=question,
            text=output.text,
            verdict=protocol.score(question, output.text),
            ms=ms,
            read_ms=read_ms,
            cache_bytes=stats.cache_bytes,
            full_cache_bytes=stats.full_cache_bytes,
            peak_bytes=stats.peak_bytes,
        )


def _in_prompt(engine: Engine, sample: Sample, limit: int, chunk: int | None, blind: bool) -> Iterator[Reply]:
    for question in sample.questions:
        start = time.perf_counter()
        parts = sample.content(engine.supports_video)
        seen = (part for part in parts if part["type"] == "text") if blind else parts
        content = chain(seen, [{"type": "text", "text": question.text}])
        messages = [{"role": "user", "content": content}]
        output = engine.generate(messages, max_new_tokens=limit, do_sample=False, prefill_chunk_size=chunk)
        yield question, output, _ms_since(start), None


def _next_turn(engine: Engine, sample: Sample, limit: int, chunk: int | None) -> Iterator[Reply]:
    start = time.perf_counter()
    chat = engine.chat(do_sample=False, prefill_chunk_size=chunk)
    chat.read(sample.content(engine.supports_video))
    read_ms = _ms_since(start)
    last = sample.questions[-1]
    for question in sample.questions:
        start = time.perf_counter()
        going_on = chat if question is last else chat.fork()  # the last one needs no copy of a long cache
        output = going_on.send(question.text, max_new_tokens=limit)
        yield question, output, _ms_since(start), read_ms


def _ms_since(start: float) -> float:
    return 1e3 * (time.perf_counter() - start)
