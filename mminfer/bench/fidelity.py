"""How far settings move a model's predictions: the uncompressed model's continuation, forced upon each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import LogitsProcessor, LogitsProcessorList

from mminfer.bench.contexts import Context
from mminfer.bench.protocols import Ask, AskAll, Protocol, reader
from mminfer.engine import Engine
from mminfer.inputs.progress import PROGRESS
from mminfer.metrics.fidelity import kl_divergence, top1_agreement
from mminfer.metrics.stats import GenerationStats
from mminfer.output import GenerationOutput

_GREEDY: dict[str, Any] = {"do_sample": False, "num_beams": 1, "output_logits": True}


@dataclass(frozen=True)
class Continuation:
    """What the uncompressed model says.

    Args:
        token_ids: N tokens.
        logits: [N, vocabulary], what each was chosen from.
    """

    token_ids: list[int]
    logits: Tensor


@dataclass(frozen=True)
class Fidelity:
    """How close to the uncompressed model.

    Args:
        kl: KL(full || compressed) in nats, mean over positions.
        top1: fraction of positions whose most likely token is the same.
        positions: how many were compared.
    """

    kl: float
    top1: float
    positions: int


@dataclass(frozen=True)
class FidelityRow:
    """One setting by one protocol.

    Args:
        setting: its name.
        protocol: how context and question meet.
        positions: predictions compared, of all contexts and questions.
        kl: KL(full || compressed) in nats, mean.
        top1: percent of positions whose most likely token is the same.
        cache_kept: percent of the uncompressed model's cache bytes behind the prompt.
        flops_kept: percent of its FLOPs for context and question in one prompt, the language model alone.
    """

    setting: str
    protocol: str
    positions: int
    kl: float
    top1: float
    cache_kept: float
    flops_kept: float


class _Forced(LogitsProcessor):
    """Leaves each row one token to choose from at each step."""

    def __init__(self, answers: Sequence[list[int]]) -> None:
        self._left = list(zip(*answers, strict=True))[::-1]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        tokens = torch.tensor(self._left.pop(), device=scores.device)
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens[:, None], 0.0)


def continuation(ask: Ask, question: str, tokens: int) -> Continuation:
    """The greedy answer, gone on with beyond its end to so many tokens."""
    return continuations(lambda questions, **kwargs: [ask(questions[0], **kwargs)], [question], tokens)[0]


def continuations(ask_all: AskAll, questions: Sequence[str], tokens: int) -> list[Continuation]:
    """The same of several questions, asked in one batch."""
    outputs = ask_all(questions, max_new_tokens=tokens, min_new_tokens=tokens, **_GREEDY)
    return [Continuation(output.token_ids, logits_of(output)) for output in outputs]


def forced(ask: Ask, question: str, token_ids: list[int]) -> GenerationOutput:
    """An answer made to consist of these tokens, none of which may end the turn; its logits predict each of them."""
    return forced_all(lambda questions, **kwargs: [ask(questions[0], **kwargs)], [question], [token_ids])[0]


def forced_all(ask_all: AskAll, questions: Sequence[str], answers: Sequence[list[int]]) -> list[GenerationOutput]:
    """The same of several questions, asked in one batch; all answers are equally long."""
    processors = LogitsProcessorList([_Forced(answers)])
    return ask_all(questions, max_new_tokens=len(answers[0]), logits_processor=processors, **_GREEDY)


def logits_of(output: GenerationOutput) -> Tensor:
    """[N, vocabulary] of an answer that was asked to bring them."""
    if output.logits is None:
        raise ValueError("an answer without logits: pass output_logits=True")
    return output.logits


def fidelity(full: Tensor, compressed: Tensor) -> Fidelity:
    """Compares logits, [N, vocabulary] each."""
    kl = kl_divergence(full, compressed).mean().item()
    return Fidelity(kl, top1_agreement(full, compressed), len(full))


def measure(
    engines: Mapping[str, Engine],
    contexts: Sequence[Context],
    protocols: Sequence[Protocol],
    tokens: int,
    chunk_size: int,
) -> list[FidelityRow]:
    """Every engine against the uncompressed model, over the same contexts and questions.

    Args:
        engines: by name of their setting, all of one model.
        contexts: with their questions.
        protocols: each gives rows of its own.
        tokens: of a continuation.
        chunk_size: tokens of a chunk, for streamed contexts.
    """
    rows = []
    some = next(iter(engines.values()))
    plain = Engine(some.model, some.processor)
    flops = {name: flops_kept(engine, contexts[0]) for name, engine in engines.items()}
    with tqdm(total=len(protocols) * len(contexts) * (len(engines) + 1), desc="fidelity", **PROGRESS) as bar:
        for protocol in protocols:
            found: dict[str, list[tuple[Fidelity, GenerationStats]]] = {name: [] for name in engines}
            for context in contexts:
                ask = reader(plain, context.content, protocol, chunk_size)
                full = [continuation(ask, question, tokens) for question in context.questions]
                bar.update()
                for name, engine in engines.items():
                    found[name] += _compared(reader(engine, context.content, protocol, chunk_size), context, full)
                    bar.update()
            rows += [_row(name, protocol, cells, flops[name]) for name, cells in found.items()]
    return rows


def flops_kept(engine: Engine, context: Context) -> float:
    """Percent of the uncompressed model's FLOPs for a context and its first question in one prompt."""
    output = engine.generate(context.chat(context.questions[0]), max_new_tokens=1)
    return 100 * output.stats.prompt_flops / output.stats.full_prompt_flops


def _compared(ask: Ask, context: Context, full: list[Continuation]) -> Iterator[tuple[Fidelity, GenerationStats]]:
    for question, said in zip(context.questions, full, strict=True):
        output = forced(ask, question, said.token_ids)
        yield fidelity(said.logits, logits_of(output)), output.stats


def _row(name: str, protocol: Protocol, cells: list[tuple[Fidelity, GenerationStats]], flops: float) -> FidelityRow:
    found = [cell for cell, _ in cells]
    return FidelityRow(
        setting=name,
        protocol=str(protocol),
        positions=sum(f.positions for f in found),
        kl=mean(f.kl for f in found),
        top1=100 * mean(f.top1 for f in found),
        cache_kept=100 * mean(stats.cache_bytes / stats.full_cache_bytes for _, stats in cells),
        flops_kept=flops,
    )
