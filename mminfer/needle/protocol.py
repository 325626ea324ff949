"""What a needle protocol is: contexts with questions about them, and how answers count."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from mminfer.errors import InputError

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)

Part = dict[str, Any]


@dataclass(frozen=True)
class Question:
    """A question about a context.

    Args:
        kind: which of the protocol's kinds it is.
        text: as the model gets it.
        expected: the right answer, in the protocol's own form.
        depth: where the needle stands, 0 in front to 1 at the end; None: nowhere, or wherever the lot put it.
        choices: the words between which a free-text answer decides, if it does.
    """

    kind: str
    text: str
    expected: Any
    depth: float | None = None
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sample:
    """A context and the questions about it.

    Args:
        images: its length, in pictures.
        questions: each is asked on its own.
        content: makes the parts of the user's message, pictures drawn as they are taken, the same ones at every
            call; its argument says whether the model takes videos.
    """

    images: int
    questions: tuple[Question, ...]
    content: Callable[[bool], Iterator[Part]]


@dataclass(frozen=True)
class Verdict:
    """What an answer is worth.

    Args:
        right: by metric, those alone that the question counts for.
        parsed: whether it could be read as an answer at all; if not, it is wrong by every metric.
    """

    right: dict[str, bool]
    parsed: bool


class NeedleProtocol(ABC):
    """A way of asking for needles; subclasses are frozen dataclasses whose fields are its settings."""

    name: ClassVar[str]
    default_images: ClassVar[int]

    @property
    @abstractmethod
    def max_new_tokens(self) -> int:
        """Tokens that an answer in the format asked for takes at most."""

    @abstractmethod
    def check(self, images: int) -> None:
        """Raises `InputError` if contexts of so many pictures cannot be made."""

    @abstractmethod
    def samples(self, images: int, count: int, seed: int) -> Iterator[Sample]:
        """`count` contexts, of each depth where depths are told apart by context; a pure function of the arguments."""

    @abstractmethod
    def score(self, question: Question, answer: str) -> Verdict:
        """Compares an answer with what was expected."""

    @abstractmethod
    def chance(self, images: int) -> dict[str, float]:
        """By metric, how often somebody is right who guesses among all possible answers."""


def rng_for(*facts: object) -> random.Random:
    """A random generator that depends on these facts alone."""
    return random.Random(" ".join(map(str, facts)))


def check_whole(name: str, value: object, least: int, most: int | None = None) -> None:
    """Raises `InputError` unless the value is a whole number in range."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or value < least or (most is not None and value > most):  # type: ignore[operator]
        wanted = f"{least} or more" if most is None else f"{least} to {most}"
        raise InputError(f"{name}={value!r}: wanted a whole number, {wanted}")


def check_depths(depths: tuple[float, ...]) -> None:
    """Raises `InputError` unless these are different numbers from 0 to 1."""
    for depth in depths:
        if not 0 <= depth <= 1:
            raise InputError(f"depth {depth}: wanted a number from 0 (in front) to 1 (at the end)")
    if len(set(depths)) < len(depths):
        raise InputError(f"depths {', '.join(map(str, depths))}: wanted each of them once")
