"""Canaries without a setting: contexts and questions, steps of decoding, ops, chats, overlaps, published counts."""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any

import numpy as np
import torch

from benchmarks.canaries.asked import plain
from benchmarks.canaries.outcome import Outcome
from benchmarks.common import ROOT
from benchmarks.kernels.cases import CASES
from benchmarks.models import turns
from benchmarks.models.caches import random_cache
from benchmarks.paper.counts import figures
from benchmarks.quality import scores, streamed
from benchmarks.quality.needle import contexts
from mminfer import Engine, InferenceConfig, patched
from mminfer.calibration.bounds import upper_bound
from mminfer.forward.kv_cache import CACHE_NAME
from mminfer.metrics.flops import measured_flops

TURNS, STEPS, TOKEN, ENTRIES = 3, 3, 437, (100, 20)
CHATS = ((20, 30, 50), (20,))  # tokens of each
OVERLAP = (4, 1)  # pictures, contexts


def needle_data() -> Outcome:
    """A context as the bundled model is asked about it: what its pictures are like, and its first questions."""
    content, questions = next(contexts(8, 1, 7))
    pictures = [float(np.asarray(part["image"]).mean()) for part in content if part["type"] == "image"]
    return {"pictures": pictures, "questions": [f"{q.text} {q.answer}" for q in questions[:8]]}


def label_data() -> Outcome:
    """The same of the needle protocol."""
    (sample,) = streamed.PROTOCOL.samples(16, 1, 3)
    pictures = [np.asarray(part["image"]).mean() for part in sample.content(False) if part["type"] == "image"]
    asked = [f"{q.text} {q.expected}" for q in sample.questions[:8]]
    return {"pictures": [float(np.mean(pictures))], "questions": asked}


def reader_data() -> Outcome:
    """The tower of the real model."""
    return {"tower": hashlib.sha256((ROOT / "benchmarks" / "reader" / "tower.safetensors").read_bytes()).hexdigest()}


def bounds() -> Outcome:
    """What some losses are held to be below."""
    return {str(count): upper_bound([0.001 * n * n for n in range(count)], 0.95, 0.05) for count in (2, 4, 16)}


def step() -> Outcome:
    """A decoding step over a whole and a smaller cache: work counted as it runs, and bytes."""
    model, found = plain().model, {}
    for entries in ENTRIES:
        held = random_cache(model, entries, ENTRIES[0])
        ids = {"input_ids": torch.tensor([[TOKEN]]), CACHE_NAME: held, "use_cache": True}
        with torch.no_grad(), patched(model, InferenceConfig()), measured_flops() as counter:
            model(**ids)
        found[f"of {entries} entries"] = {"flops": float(counter.get_total_flops()), "bytes": held.nbytes}
    return found


def batch() -> Outcome:
    """Chats of different lengths in one batch, and one alone: work counted as it runs."""
    model, found = plain().model, {}
    told = {"max_new_tokens": STEPS, "min_new_tokens": STEPS, "do_sample": False}
    for lengths in CHATS:
        mask = torch.stack([torch.arange(max(lengths)) >= max(lengths) - length for length in lengths]).long()
        with patched(model, InferenceConfig()), measured_flops() as counter:
            model.generate(input_ids=TOKEN * mask, attention_mask=mask, **told)
        found[f"of {len(lengths)}"] = {"flops": float(counter.get_total_flops())}
    return found


def ops(names: Iterable[str]) -> dict[str, Outcome]:
    """FLOPs and bytes of small calls of these cases."""
    cases = {case.name(): case for case in CASES}
    calls = {name: cases[name].build(quick=True) for name in names if name in cases}
    return {name: {"flops": call.flops, "bytes": call.moved} for name, call in calls.items()}


def chat(name: str) -> Outcome:
    """The first turns of a long chat."""
    rows = turns.held(Engine(plain().model, plain().processor, turns.SETTINGS[name]), TURNS)
    return {str(row["turn"]): row for row in rows}


def overlap(name: str) -> Outcome:
    """Of what sampled scores keep with what exact ones keep, named by budget and text prior."""
    budget, text_prior = name.split(", ")
    rows = scores.measure(*OVERLAP, text_prior == "True", float(budget))
    return {row["queries"]: row["overlap"] for row in rows}


def published(name: str) -> Outcome:
    """What geometry alone gives."""
    return {"ours": _figures()[name]}


def figure_names() -> list[str]:
    """Of all that is published."""
    return list(_figures())


@cache
def _figures() -> dict[str, str]:
    rows = [figure.row() for figure in figures()]
    return {figure_name(row): str(row["ours"]) for row in rows}


def figure_name(row: Mapping[str, Any]) -> str:
    """What tells a published figure apart."""
    return ", ".join(str(row[column]) for column in ("paper", "table", "model", "setting", "quantity"))


def one_by_one(run: Callable[[str], Outcome], known: Iterable[str]) -> Callable[[Iterable[str]], dict[str, Outcome]]:
    """Runs canaries one after the other, those that are still known."""
    known = set(known)
    return lambda names: {name: run(name) for name in names if name in known}
