"""One cell of the yardstick: all questions over all books by one protocol, under one setting, beside the full model."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from statistics import mean
from typing import Any

from torch import Tensor

from benchmarks.reader.books import Book, Question
from mminfer import Engine
from mminfer.bench.fidelity import Continuation, Fidelity, continuations, fidelity, forced_all, logits_of
from mminfer.bench.protocols import AskAll, Part, Protocol, batch_reader
from mminfer.metrics.stats import GenerationStats
from mminfer.needle.scores import wilson
from mminfer.output import GenerationOutput

CHUNK = 160  # tokens, two pages
ANSWER = 6  # tokens, in which the answer must stand
LONG, FORCED = 12, 2  # tokens of a continuation, continuations of a book
ROWS_OF_ANSWERS = 16  # in one batch: as many as the fused step takes
PIXELS, EMBEDDINGS = MODELS = ("pixels", "embeddings")
ALL = "all"


@dataclass(frozen=True)
class Answer:
    """One answer.

    Args:
        token_ids: its first tokens.
        right: whether the right answer stands in them.
    """

    token_ids: tuple[int, ...]
    right: bool


@dataclass
class Reading:
    """A book as content, and what the uncompressed model says about it.

    Args:
        book: pages and questions.
        content: parts of the user's message.
        answers: the full model's, of every question.
        long: its continuations of the first questions.
    """

    book: Book
    content: list[Part]
    answers: list[Answer] = field(default_factory=list)
    long: list[Continuation] = field(default_factory=list)


@dataclass(frozen=True)
class Told:
    """What a setting says about one book.

    Args:
        reading: the book, and the full model's answers.
        answers: to every question.
        long: how its predictions of the full model's continuations differ.
        seconds: that taking the context in took.
        stats: of the last answer.
    """

    reading: Reading
    answers: list[Answer]
    long: list[Fidelity]
    seconds: float
    stats: GenerationStats


def content_of(book: Book, engine: Engine, model: str) -> list[Part]:
    """The pages of a book with a text before each: as images, or as the embeddings of the tokens they show."""
    tokenizer = engine.processor.tokenizer
    if model == PIXELS:
        pages: list[Part] = [{"type": "image", "image": image} for image in book.images(tokenizer)]
    else:
        table: Tensor = engine.model.get_input_embeddings().weight.detach()
        pages = [{"type": "embedding", "embedding": table[page.ids]} for page in book.pages]
    breaks = ["", *["\n"] * (len(pages) - 1)]
    texts = [{"type": "text", "text": f"{lead}Report {n}:"} for n, lead in enumerate(breaks, 1)]
    return [part for pair in zip(texts, pages, strict=True) for part in pair]


def refer(engine: Engine, book: Book, model: str, protocol: Protocol) -> Told:
    """Reads a book and asks the uncompressed model; what it says is what `ask` compares with."""
    reading = Reading(book, content_of(book, engine, model))
    ask_all, seconds = _take_in(engine, reading, protocol)
    reading.answers, stats = _answers(ask_all, book.questions)
    reading.long = continuations(ask_all, _asked_long(book), LONG)
    return Told(reading, reading.answers, [Fidelity(0.0, 1.0, LONG)], seconds, stats)


def ask(engine: Engine, reading: Reading, protocol: Protocol) -> Told:
    """Asks under some setting, all questions of a book."""
    ask_all, seconds = _take_in(engine, reading, protocol)
    answers, stats = _answers(ask_all, reading.book.questions)
    told = forced_all(ask_all, _asked_long(reading.book), [said.token_ids for said in reading.long])
    long = [fidelity(said.logits, logits_of(own)) for said, own in zip(reading.long, told, strict=True)]
    return Told(reading, answers, long, seconds, stats)


def _take_in(engine: Engine, reading: Reading, protocol: Protocol) -> tuple[AskAll, float]:
    start = time.perf_counter()
    return batch_reader(engine, reading.content, protocol, CHUNK), time.perf_counter() - start


def _asked_long(book: Book) -> list[str]:
    return [_posed(question) for question in book.questions[:FORCED]]


def _posed(question: Question) -> str:
    return f"\n{question.text}"


def _answers(ask_all: AskAll, questions: Sequence[Question]) -> tuple[list[Answer], GenerationStats]:
    """The answers, and the figures of the last one."""
    outputs: list[GenerationOutput] = []
    for first in range(0, len(questions), ROWS_OF_ANSWERS):
        posed = [_posed(question) for question in questions[first : first + ROWS_OF_ANSWERS]]
        outputs += ask_all(posed, max_new_tokens=ANSWER, do_sample=False)
    pairs = zip(questions, outputs, strict=True)
    return [Answer(tuple(o.token_ids), q.answer in o.text) for q, o in pairs], outputs[-1].stats


def rows_of(told: Sequence[Told], tokens_of_answers: dict[str, int]) -> Iterator[dict[str, Any]]:
    """A row for all questions, and one for each kind of page and question.

    Args:
        told: of all books.
        tokens_of_answers: how many of its tokens make an answer, by kind of question.
    """
    pairs = [(one, n) for one in told for n in range(len(one.reading.book.questions))]
    cells: dict[tuple[str, str], list[tuple[Told, int]]] = {(ALL, ALL): pairs}
    for one, n in pairs:
        cells.setdefault((one.reading.book.kind, one.reading.book.questions[n].kind), []).append((one, n))
    for (pages, kind), own in cells.items():
        books = [one for one in told if pages in (ALL, one.reading.book.kind)]
        yield {"pages": pages, "kind": kind} | _counts(own, tokens_of_answers) | _figures(books)


def _counts(pairs: Sequence[tuple[Told, int]], tokens_of_answers: dict[str, int]) -> dict[str, Any]:
    right = full_right = stayed = same = 0
    for one, n in pairs:
        own, was, question = one.answers[n], one.reading.answers[n], one.reading.book.questions[n]
        length = tokens_of_answers[question.kind]
        right, full_right, stayed = right + own.right, full_right + was.right, stayed + (own.right and was.right)
        same += own.token_ids[:length] == was.token_ids[:length]
    low, high = wilson(stayed, full_right) if full_right else (0.0, 1.0)
    return {
        "questions": len(pairs),
        "right": right,
        "full_right": full_right,
        "stayed": stayed,
        "kept": _percent(stayed, full_right),
        "kept_low": round(100 * low, 1),
        "kept_high": round(100 * high, 1),
        "same": _percent(same, len(pairs)),
    }


def _percent(part: int, whole: int) -> float | str:
    return round(100 * part / whole, 1) if whole else ""


def _figures(books: Sequence[Told]) -> dict[str, Any]:
    return {
        "kl": round(mean(f.kl for one in books for f in one.long), 4),
        "cache_kept": round(100 * mean(one.stats.cache_bytes / one.stats.full_cache_bytes for one in books), 2),
        "cache_bytes": round(mean(one.stats.cache_bytes for one in books)),
        "context_s": round(mean(one.seconds for one in books), 3),
    }


def answer_tokens(tokenizer: Any, questions: Sequence[Question]) -> dict[str, int]:
    """How many tokens an answer has, by kind of question; those of one kind are alike."""
    return {q.kind: len(tokenizer(f" {q.answer}", add_special_tokens=False).input_ids) for q in questions}
