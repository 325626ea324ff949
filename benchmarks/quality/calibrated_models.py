"""What calibrations are tried on: the bundled model, random ones of other geometry, and the real model behind pages."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from benchmarks.quality.smol import loaded
from benchmarks.quality.smol_cells import PIXELS, content_of
from benchmarks.reader.assembling import prepared
from benchmarks.reader.books import DENSE, PAGE_KINDS, book
from mminfer import Engine
from mminfer.nano.build import build_model, build_processor
from mminfer.needle.labels import Labels

PICTURES = 4  # of a context of nano's
PROTOCOL = Labels(depths=tuple(n / (PICTURES - 1) for n in range(PICTURES)))
SHARP = 4.0  # times the embeddings of random weights, so that they foretell something
GEOMETRIES = {"random, 10 layers of 128": (128, 10), "random, 4 layers of 320": (320, 4)}
NANO, SMOL, SMOL_DENSE = "nano", "SmolLM2", "SmolLM2, dense text"
MODELS = (NANO, *GEOMETRIES, SMOL, SMOL_DENSE)


@dataclass(frozen=True)
class Asked:
    """A sample.

    Args:
        chat: context and question.
        is_right: whether an answer is; None: nobody knows what would be.
    """

    chat: list[dict[str, Any]]
    is_right: Callable[[str], bool] | None = None


@dataclass(frozen=True)
class Subject:
    """A model and what it is asked.

    Args:
        name: of the model.
        engine: without techniques.
        samples: so many, by a seed.
        tokens: of an answer.
    """

    name: str
    engine: Engine
    samples: Callable[[int, int], list[Asked]]
    tokens: int


def subject_of(name: str, cache: Path | None = None) -> Subject:
    """One of `MODELS`; cache: folder of the prepared real model."""
    if name == NANO:
        return Subject(name, Engine.from_pretrained("nano"), labelled, 8)
    if name in GEOMETRIES:
        return Subject(name, _random(*GEOMETRIES[name]), _unanswered, 8)
    engine = loaded(prepared(cache))
    kinds = (DENSE,) if name == SMOL_DENSE else PAGE_KINDS
    return Subject(name, engine, lambda count, seed: list(islice(_pages(engine, kinds, seed), count)), 8)


def labelled(count: int, seed: int) -> list[Asked]:
    """Contexts of labelled pictures, one question about each, of every kind in turn."""
    found = []
    for place, sample in enumerate(PROTOCOL.samples(PICTURES, count, seed)):
        question = sample.questions[place % len(sample.questions)]
        content = [*sample.content(False), {"type": "text", "text": question.text}]
        chat = [{"role": "user", "content": content}]

        def is_right(text: str, question: Any = question) -> bool:
            return all(PROTOCOL.score(question, text).right.values())

        found.append(Asked(chat, is_right))
    return found


def _unanswered(count: int, seed: int) -> list[Asked]:
    return [Asked(own.chat) for own in labelled(count, seed)]


def _random(hidden: int, layers: int) -> Engine:
    processor = build_processor()
    torch.manual_seed(0)
    model = build_model(processor.tokenizer, hidden, layers).eval()
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(SHARP)
    return Engine(model, processor)


def _pages(engine: Engine, kinds: Sequence[str], seed: int) -> Iterator[Asked]:
    """Books of these kinds in turn, one question about each."""
    place = 0
    while True:
        own = book(kinds[place % len(kinds)], 1000 * seed + place, engine.processor.tokenizer)
        question = own.questions[place % len(own.questions)]
        content = [*content_of(own, engine, PIXELS), {"type": "text", "text": f"\n{question.text}"}]

        def is_right(text: str, answer: str = question.answer) -> bool:
            return answer in text

        yield Asked([{"role": "user", "content": content}], is_right)
        place += 1
