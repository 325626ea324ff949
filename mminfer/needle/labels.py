"""Labelled needles: pictures with labels, and text facts, among frames without any; the bundled model's questions."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from mminfer.errors import InputError
from mminfer.nano import data
from mminfer.needle.answers import find_word
from mminfer.needle.pictures import COMBOS, draw
from mminfer.needle.protocol import (
    DEPTHS,
    NeedleProtocol,
    Part,
    Question,
    Sample,
    Verdict,
    check_depths,
    check_whole,
    rng_for,
)

Q1, Q1_NONE, Q2, Q3 = "Q1", "Q1 none", "Q2", "Q3"
METRICS = {"q1": Q1, "q1_none": Q1_NONE, "q2_digit": Q2, "q2_colour": Q2, "q3": Q3}

Groups = dict[float, list[data.ImageItem | data.FactItem]]  # by depth


@dataclass(frozen=True)
class Labels(NeedleProtocol):
    """At every depth labelled pictures and a fact, between them frames that show none of what is asked for.

    Questions are those of the bundled model: which label a picture has (Q1), or that none shows it, what a labelled
    picture shows (Q2), what a fact says (Q3). All are asked of one context.

    Args:
        needles: labelled pictures at each depth.
        picture_size: pixels a side of a picture; 32 is the bundled model's own.
        depths: where they stand.
    """

    needles: int = 1
    picture_size: int = data.IMAGE_SIZE
    depths: tuple[float, ...] = DEPTHS

    name: ClassVar[str] = "labels"
    default_images: ClassVar[int] = 16

    def __post_init__(self) -> None:
        check_whole("needles", self.needles, 1)
        check_whole("picture_size", self.picture_size, 8, 2048)
        check_depths(self.depths)
        if not self.depths or self._labelled > COMBOS - 2:
            raise InputError(
                f"{len(self.depths)} depths of {self.needles} labelled pictures: wanted 1 to {COMBOS - 2} in all"
            )

    @property
    def max_new_tokens(self) -> int:
        return 16

    @property
    def _labelled(self) -> int:
        return len(self.depths) * self.needles

    def check(self, images: int) -> None:
        check_whole("images", images, 1)
        if images < self._labelled:
            raise InputError(
                f"images={images}: wanted {self._labelled} or more, {self.needles} labelled at each of "
                f"{len(self.depths)} depths: more images, or fewer depths or needles"
            )

    def samples(self, images: int, count: int, seed: int) -> Iterator[Sample]:
        for n in range(count):
            yield self._sample(images, rng_for(self.name, self.needles, self.depths, seed, images, n))

    def score(self, question: Question, answer: str) -> Verdict:
        word = find_word(answer, question.choices)
        return Verdict({METRICS[question.kind]: word == question.expected}, word is not None)

    def chance(self, images: int) -> dict[str, float]:
        """Of somebody who guesses among the context's labels and "none", digits or colours, the context's codes."""
        label = 1 / (self._labelled + 1)
        content = (1 / len(data.DIGIT_NAMES) + 1 / len(data.COLOUR_NAMES)) / 2
        return {Q1: label, Q1_NONE: label, Q2: content, Q3: 1 / len(self.depths)}

    def _sample(self, images: int, rng: random.Random) -> Sample:
        depths = sorted(self.depths)
        tasks = ["q1"] * self._labelled + ["q1_none"] + ["q2"] * self._labelled + ["q3"] * len(depths)
        context = data.sample_context(rng, self._labelled, len(depths), tasks)
        groups: Groups = {
            depth: [*context.images[k * self.needles : (k + 1) * self.needles], context.facts[k]]
            for k, depth in enumerate(depths)
        }
        for group in groups.values():
            rng.shuffle(group)
        missing = next(q.text for q in context.questions if q.task == "q1_none")
        frames = _frames(rng, images - self._labelled, {image.combo for image in context.images}, missing)
        items = list(_items(groups, frames))
        pictures = rng.getrandbits(60)
        return Sample(
            images, tuple(_questions(context, groups)), lambda video: _parts(items, pictures, self.picture_size)
        )


def _frames(rng: random.Random, count: int, shown: set[int], missing: str) -> list[int]:
    """What the frames without a label show: nothing that a question asks for."""
    free = [c for c in range(COMBOS) if c not in shown and not missing.endswith(f" {_phrase(c)}?")]
    return [rng.choice(free) for _ in range(count)]


def _phrase(combo: int) -> str:
    digit, colour = divmod(combo, len(data.COLOUR_NAMES))
    return f"{data.COLOUR_NAMES[colour]} {digit}"


def _items(groups: Groups, frames: list[int]) -> Iterator[str | int]:
    """Texts, and combos of pictures, in order."""
    remaining = [(round(depth * len(frames)), group) for depth, group in groups.items()]
    for n in range(len(frames) + 1):
        while remaining and remaining[0][0] == n:
            for item in remaining.pop(0)[1]:
                yield item.text
                if isinstance(item, data.ImageItem):
                    yield item.combo
        yield from frames[n : n + 1]


def _parts(items: list[str | int], seed: int, side: int) -> Iterator[Part]:
    pictures = draw((item for item in items if isinstance(item, int)), seed, side)
    for item in items:
        yield {"type": "text", "text": item} if isinstance(item, str) else {"type": "image", "image": next(pictures)}


def _questions(context: data.Context, groups: Groups) -> Iterator[Question]:
    """The context's questions, each with its needle's depth here and the answers between which it decides."""
    names = {
        item.label if isinstance(item, data.ImageItem) else item.word: depth
        for depth, group in groups.items()
        for item in group
    }
    labels = (*(image.label for image in context.images), data.NONE)
    choices = {
        "q1": labels,
        "q1_none": labels,
        "q2_digit": tuple(data.DIGIT_NAMES),
        "q2_colour": tuple(data.COLOUR_NAMES),
        "q3": tuple(data.CODES),
    }
    for question in context.questions:
        subject = question.answer if question.task == "q1" else question.text.rstrip("?").split()[-1]
        depth = None if question.task == "q1_none" else names[subject]
        yield Question(question.task, question.text, question.answer, depth, choices[question.task])
