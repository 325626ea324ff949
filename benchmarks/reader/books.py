"""Books of report pages that state facts, and questions about the facts: a pure function of seed and kind.

A question is the beginning of the sentence that states the fact, for the model to go on with: a language model this
small continues well and converses badly.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from benchmarks.reader.drawing import Renderer
from benchmarks.reader.grid import Page
from benchmarks.reader.words import CITIES, COLOURS, FILLERS, JOBS, NAMES, TITLES

PAGES = 4  # of a book
DENSE, SPARSE, PICTURES, MIXED = PAGE_KINDS = ("dense text", "sparse text", "pictures", "mixed")
CODE, JOB, COLOUR, PICTURE = QUESTION_KINDS = ("code", "job", "colour", "picture")


@dataclass(frozen=True)
class Question:
    """A question about a book.

    Args:
        kind: one of `QUESTION_KINDS`.
        text: the sentence's beginning.
        answer: how it goes on.
        page: where the answer stands.
    """

    kind: str
    text: str
    answer: str
    page: int


@dataclass
class Book:
    """Pages and what may be asked about them.

    Args:
        kind: one of `PAGE_KINDS`.
        seed: of everything in it.
        pages: as cells.
        questions: in the order of the pages.
    """

    kind: str
    seed: int
    pages: list[Page] = field(default_factory=list)
    questions: list[Question] = field(default_factory=list)

    def images(self, tokenizer: Any) -> list[Image.Image]:
        """The pages, drawn."""
        renderer = Renderer(tokenizer, self.seed)
        return [renderer.draw(page) for page in self.pages]


class _Facts:
    """Facts of which no two are about the same city or person."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._cities, self._names = rng.sample(CITIES, len(CITIES)), rng.sample(NAMES, len(NAMES))

    def make(self, kind: str, page: int) -> Question:
        rng = self._rng
        if kind == CODE:
            return Question(kind, f"The access code of {self._cities.pop()} is", _digits(rng, 4), page)
        if kind == JOB:
            return Question(kind, f"{self._names.pop()} is a", rng.choice(JOBS), page)
        subject = "color" if kind == COLOUR else "picture"
        return Question(kind, f"The {subject} of {self._cities.pop()} is", rng.choice(COLOURS), page)


def book(kind: str, seed: int, tokenizer: Any) -> Book:
    """Makes a book."""
    rng = random.Random(f"{kind} {seed}")
    made, facts = Book(kind, seed), _Facts(rng)
    for number in range(PAGES):
        page, own = Page(tokenizer), PAGE_KINDS[number % 3] if kind == MIXED else kind
        made.questions += LAYOUTS[own](page, facts, number, rng)
        made.pages.append(page)
    return made


def _dense(page: Page, facts: _Facts, number: int, rng: random.Random) -> list[Question]:
    """Three facts among other sentences, to the end of the page."""
    asked = [facts.make(kind, number) for kind in (CODE, JOB, COLOUR)]
    stated, others = [_sentence(fact) for fact in asked], iter(rng.sample(FILLERS, len(FILLERS)))
    sentences = [*stated, next(others), next(others)]
    rng.shuffle(sentences)
    for sentence in sentences:
        page.write(sentence)
    for sentence in others:
        page.write(sentence)
    return asked


def _sparse(page: Page, facts: _Facts, number: int, rng: random.Random) -> list[Question]:
    """Two facts below a headline, a line each and a blank one between."""
    kinds = rng.sample((CODE, JOB, COLOUR), 2)
    asked = [facts.make(kind, number) for kind in kinds]
    page.write_headline(rng.choice(TITLES))
    for fact in asked:
        page.write(_sentence(fact), line=True)
        page.leave_line()
    return asked


def _pictures(page: Page, facts: _Facts, number: int, rng: random.Random) -> list[Question]:
    """An area of colour below a headline, beside its caption."""
    fact = facts.make(PICTURE, number)
    page.write_headline(rng.choice(TITLES))
    page.write(fact.text, line=True)
    page.paint(rng.choice((2, 3)), fact.answer)
    return [fact]


LAYOUTS: dict[str, Callable[[Page, _Facts, int, random.Random], list[Question]]] = {
    DENSE: _dense,
    SPARSE: _sparse,
    PICTURES: _pictures,
}


def _sentence(fact: Question) -> str:
    return f"{fact.text} {fact.answer}."


def _digits(rng: random.Random, count: int) -> str:
    return "".join(rng.choice("0123456789") for _ in range(count))


def books(questions: int, seed: int, tokenizer: Any) -> Iterator[Book]:
    """Books of each kind in turn, until there are enough questions."""
    asked = number = 0
    while asked < questions:
        for kind in PAGE_KINDS:
            yield (made := book(kind, 1000 * seed + number, tokenizer))
            asked += len(made.questions)
        number += 1
