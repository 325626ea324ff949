"""Contexts and questions of the comparison with kvpress's KVzip, as mminfer's content and as a peer's token ids."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers.workers.wire import Prompt
from benchmarks.quality import smol_cells
from benchmarks.quality.needle import CHUNK, contexts
from benchmarks.quality.smol import loaded
from benchmarks.reader.assembling import prepared
from benchmarks.reader.books import books
from mminfer import Engine
from mminfer.bench.fidelity import continuations, forced_all, logits_of
from mminfer.bench.protocols import Part
from mminfer.forward.kv_cache import CompressedCache
from mminfer.forward.native_build import prepare_kernels
from mminfer.inputs.content import MediaOptions
from mminfer.inputs.transcript import Transcript
from mminfer.layout import GIVEN_ROWS
from mminfer.nano import checkpoint_path
from mminfer.output import GenerationOutput
from mminfer.running import RunOptions

NANO = "nano"
MODELS = (smol_cells.EMBEDDINGS, smol_cells.PIXELS, NANO)


@dataclass
class Case:
    """A context, what is asked about it, and when an answer is right.

    Args:
        content: parts of the user's message.
        questions: as they stand in the chat.
        forced: token ids of answers, equally long, whose divergence counts: of the first questions.
        length: tokens of an answer.
        chunk: tokens of a chunk, where it is streamed.
        end: token ids that end an answer.
        judge: whether these token ids answer the question of this number.
        words: token ids that stand in the place of pictures; []: pictures are pixels.
        chunks: how long the pieces are in which it is streamed.
    """

    content: list[Part]
    questions: list[str]
    forced: list[list[int]]
    length: int
    chunk: int
    end: set[int]
    judge: Callable[[int, list[int]], bool]
    words: list[int] = field(default_factory=list)
    chunks: list[int] = field(default_factory=list)

    def judged(self, said: Sequence[list[int]]) -> list[bool]:
        """Whether the answers are right, question by question."""
        return [self.judge(number, token_ids) for number, token_ids in enumerate(said)]

    def until_end(self, token_ids: list[int]) -> list[int]:
        """An answer up to the first token that ends it."""
        last = next((n for n, token in enumerate(token_ids) if token in self.end), len(token_ids))
        return token_ids[: last + 1]


class Take:
    """A context in a cache, and what is answered from copies of it.

    Args:
        engine: who is asked.
        content: parts of the user's message, without the question.
        chunk: tokens of a chunk; None: all at once.
    """

    def __init__(self, engine: Engine, content: Sequence[Part], chunk: int | None) -> None:
        self.cache, self._engine, self._options = CompressedCache(), engine, RunOptions(chunk)
        reading = engine.reader.turn(Transcript(), list(content), MediaOptions(), closes=False, size=chunk)
        engine.runner.read([reading], [self.cache], self._options)
        self._read = reading.transcript

    @property
    def tokens(self) -> int:
        """Of the context."""
        return self.cache.tokens[0]

    def ask_all(self, questions: Sequence[str], **kwargs: Any) -> list[GenerationOutput]:
        """What it answers, each question on its own; keyword arguments are the host's."""
        settings, outputs = self._engine.runner.settings(kwargs), []
        for first in range(0, len(questions), smol_cells.ROWS_OF_ANSWERS):
            some = questions[first : first + smol_cells.ROWS_OF_ANSWERS]
            media, size = MediaOptions(), self._options.chunk_size
            turns = [self._engine.reader.turn(self._read, q, media, closes=True, size=size) for q in some]
            caches = [self.cache.clone() for _ in turns]
            outputs += self._engine.runner.answer(turns, caches, 0.0, self._options, settings)
        return outputs

    def said(self, case: Case) -> list[list[int]]:
        """Greedy answers to all questions."""
        return [list(o.token_ids) for o in self.ask_all(case.questions, max_new_tokens=case.length, do_sample=False)]

    def foretold(self, case: Case) -> Tensor:
        """Logits [answers, tokens, vocabulary] where the forced answers are foretold."""
        told: list[GenerationOutput] = []
        for first in range(0, len(case.forced), smol_cells.ROWS_OF_ANSWERS):
            some = slice(first, min(first + smol_cells.ROWS_OF_ANSWERS, len(case.forced)))
            told += forced_all(self.ask_all, case.questions[some], case.forced[some])
        return torch.stack([logits_of(output) for output in told])


def plain_engine(model: str, cache: Path | None) -> Engine:
    """The uncompressed model, its kernels built.

    Args:
        model: one of `MODELS`.
        cache: folder of the prepared real model; None: in the user's cache folder.
    """
    engine = Engine.from_pretrained(NANO) if model == NANO else loaded(model_folder(model, cache))
    prepare_kernels(engine.device)
    return engine


def model_folder(model: str, cache: Path | None) -> Path:
    """Where a model's checkpoint lies."""
    return checkpoint_path() if model == NANO else prepared(cache)


def cases_of(plain: Engine, model: str, images: int, questions: int, seed: int) -> list[Case]:
    """Contexts until there are so many questions.

    Args:
        plain: the uncompressed model.
        model: one of `MODELS`.
        images: of a context of nano; books have as many as they have.
        questions: least number.
        seed: of the contexts.
    """
    if model == NANO:
        return [_of_pictures(plain, content, asked) for content, asked in contexts(images, questions, seed)]
    return [_of_book(plain, book, model) for book in books(questions, seed, plain.processor.tokenizer)]


def _of_book(plain: Engine, book: Any, model: str) -> Case:
    """A book of the yardstick; what is forced is how the uncompressed model goes on behind its first questions."""
    tokenizer, content = plain.processor.tokenizer, smol_cells.content_of(book, plain, model)
    asked = [f"\n{question.text}" for question in book.questions]
    whole = Take(plain, content, None)
    long = continuations(whole.ask_all, asked[: smol_cells.FORCED], smol_cells.LONG)

    def judge(number: int, token_ids: list[int]) -> bool:
        return book.questions[number].answer in tokenizer.decode(token_ids, skip_special_tokens=True)

    return Case(
        content=content,
        questions=asked,
        forced=[list(said.token_ids) for said in long],
        length=smol_cells.ANSWER,
        chunk=smol_cells.CHUNK,
        end={tokenizer.eos_token_id},
        judge=judge,
        words=[token for page in book.pages for token in page.ids] if model == smol_cells.EMBEDDINGS else [],
    )


def _of_pictures(plain: Engine, content: list[Part], questions: Sequence[Any]) -> Case:
    """Pictures of unseen handwriting; what is forced is the right answers, the end of the turn included."""
    tokenizer = plain.processor.tokenizer
    end = tokenizer.eos_token_id
    right = [[*tokenizer(question.answer).input_ids, end] for question in questions]
    return Case(
        content=content,
        questions=[question.text for question in questions],
        forced=right,
        length=max(len(token_ids) for token_ids in right),
        chunk=CHUNK,
        end={end},
        judge=lambda number, token_ids: token_ids == right[number],
    )


def exported(plain: Engine, case: Case) -> Prompt:
    """The same as token ids; notes how long the chunks of a streamed context are."""
    media = MediaOptions()
    reading = plain.reader.turn(Transcript(), case.content, media, closes=False, size=None)
    (whole,) = list(reading)
    pieces = list(plain.reader.turn(Transcript(), case.content, media, closes=False, size=case.chunk))
    ids = whole["input_ids"][0].tolist()
    if [token for piece in pieces for token in piece["input_ids"][0].tolist()] != ids:
        raise ValueError("a context whose pieces have other token ids than the whole")
    case.chunks = [n for piece in pieces for n in chunk_lengths(_in_picture(plain, piece), case.chunk)]
    questions = []
    for question in case.questions:
        turn = plain.reader.turn(reading.transcript, question, media, closes=True, size=None)
        questions.append([token for piece in turn for token in piece["input_ids"][0].tolist()])
    if case.words:
        words = iter(case.words)
        ids = [next(words) if held else token for token, held in zip(ids, _in_picture(plain, whole), strict=True)]
    answers = [*case.forced, *([] for _ in questions[len(case.forced) :])]
    pixels = torch.zeros(0) if case.words else whole["pixel_values"]
    return Prompt(ids, pixels, questions, answers, [""] * len(questions))


def _in_picture(plain: Engine, inputs: dict[str, Any]) -> list[bool]:
    """Of each token whether it stands in the place of a picture or an embedding."""
    held = inputs["input_ids"] == plain.model.config.image_token_id
    if GIVEN_ROWS in inputs:
        held = held | inputs[GIVEN_ROWS].mask
    flags: list[bool] = held[0].tolist()
    return flags


def chunk_lengths(in_picture: Sequence[bool], size: int) -> list[int]:
    """How a piece goes through the layers: so many tokens at most, and no picture is split."""
    last = len(in_picture)
    free = [n for n in range(1, last) if not (in_picture[n - 1] and in_picture[n])] + [last]
    cuts = [0]
    while cuts[-1] < last:
        cuts.append(max(n for n in free if n <= cuts[-1] + size))
    return [b - a for a, b in pairwise(cuts)]
