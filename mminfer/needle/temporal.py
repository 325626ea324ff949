"""Temporal needles: frames that stand out in a long video, what they show and when they come."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import ClassVar

import numpy as np

from mminfer.errors import InputError
from mminfer.nano.pictures import COLOUR_NAMES, DIGIT_NAMES
from mminfer.needle.answers import find_word
from mminfer.needle.pictures import COLOURS, draw
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

CLIP = 256  # frames of one video part: a longer video goes in as several, none of them held longer than it takes
THIRDS = ("first", "middle", "last")
WHAT, WHEN, ORDER = "what", "when", "order"


@dataclass(frozen=True)
class Temporal(NeedleProtocol):
    """A video of digits, one a frame; a needle is the only frame in its colour.

    Asked are the digit of the needle at the given depth, in which third of the video it comes and, with several
    needles, which of two comes first. A model that takes no videos gets the frames as images.

    Args:
        needles: frames that stand out, each in a colour of its own; one stands at the depth, the rest by lot.
        picture_size: pixels a side of a frame.
        depths: where the needle that is asked for stands, samples of each.

    Reference:
        OmChat (arXiv 2407.04923) has the idea: needle images at chosen depths among the frames of a long video. Frames,
        needles and questions are ours.
    """

    needles: int = 1
    picture_size: int = 224
    depths: tuple[float, ...] = DEPTHS

    name: ClassVar[str] = "temporal"
    default_images: ClassVar[int] = 16

    def __post_init__(self) -> None:
        check_whole("needles", self.needles, 1, COLOURS - 1)
        check_whole("picture_size", self.picture_size, 8, 2048)
        check_depths(self.depths)
        if not self.depths:
            raise InputError("no depths: wanted at least one, from 0 to 1")

    @property
    def max_new_tokens(self) -> int:
        return 32

    def check(self, images: int) -> None:
        check_whole("images", images, 1)
        if self.needles > images:
            raise InputError(f"needles={self.needles} in {images} frames: wanted {images} at most: more images")

    def samples(self, images: int, count: int, seed: int) -> Iterator[Sample]:
        for depth in self.depths:
            for n in range(count):
                yield self._sample(images, depth, rng_for(self.name, self.needles, seed, images, depth, n))

    def score(self, question: Question, answer: str) -> Verdict:
        word = find_word(answer, question.choices)
        return Verdict({question.kind: word == question.expected}, word is not None)

    def chance(self, images: int) -> dict[str, float]:
        """Of somebody who guesses among the ten digits, the thirds, the two colours."""
        order = {ORDER: 0.5} if self.needles > 1 else {}
        return {WHAT: 1 / len(DIGIT_NAMES), WHEN: 1 / len(THIRDS)} | order

    def _sample(self, images: int, depth: float, rng: random.Random) -> Sample:
        colours = rng.sample(range(COLOURS), COLOURS)
        asked = round(depth * (images - 1))
        elsewhere = rng.sample([frame for frame in range(images) if frame != asked], self.needles - 1)
        places = [asked, *elsewhere]
        digits = [rng.randrange(10) for _ in places]
        needles = {f: d * COLOURS + c for f, d, c in zip(places, digits, colours, strict=False)}
        filler, pictures = rng.getrandbits(60), rng.getrandbits(60)

        def content(video: bool) -> Iterator[Part]:
            combos = _frames(images, needles, colours[self.needles :], random.Random(filler))
            return _parts(combos, pictures, self.picture_size, video)

        return Sample(images, tuple(self._ask(images, depth, places, digits, colours)), content)

    def _ask(
        self, images: int, depth: float, places: list[int], digits: list[int], colours: list[int]
    ) -> Iterator[Question]:
        names = [COLOUR_NAMES[c] for c in colours]
        told = f"These are {images} frames of a video in order, each with a digit. One digit is {names[0]}. "
        what = f"{told}Which digit is it? Answer with the digit alone."
        yield Question(WHAT, what, str(digits[0]), depth, tuple(DIGIT_NAMES))
        when = f"{told}Does it come in the first third, the middle third or the last third of the video? "
        when += "Answer with one word: first, middle or last."
        third = min(3 * places[0] // images, 2)
        yield Question(WHEN, when, THIRDS[third], depth, THIRDS)
        if self.needles > 1:
            pair = tuple(sorted(names[:2]))
            order = (
                f"These are {images} frames of a video in order, each with a digit. One digit is {pair[0]} and one is "
            )
            order += f"{pair[1]}. Which of the two comes first? Answer with its colour alone."
            first = names[0] if places[0] < places[1] else names[1]
            yield Question(ORDER, order, first, depth, pair)


def _frames(images: int, needles: dict[int, int], colours: list[int], rng: random.Random) -> Iterator[int]:
    for frame in range(images):
        drawn = rng.randrange(10) * COLOURS + rng.choice(colours)
        yield needles.get(frame, drawn)


def _parts(combos: Iterator[int], seed: int, side: int, video: bool) -> Iterator[Part]:
    pictures = draw(combos, seed, side)
    if not video:
        yield from ({"type": "image", "image": picture} for picture in pictures)
        return
    while clip := list(islice(pictures, CLIP)):
        yield {"type": "video", "video": np.stack([np.asarray(picture) for picture in clip])}
