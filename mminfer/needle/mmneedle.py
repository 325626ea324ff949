"""MMNeedle: which image, row and column of a stitched haystack does a caption describe, if any?"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import ClassVar

from PIL import Image

from mminfer.errors import InputError
from mminfer.needle.answers import ABSENT, Place, parse_places
from mminfer.needle.pictures import COMBOS, caption, draw, stitch
from mminfer.needle.protocol import (
    NeedleProtocol,
    Part,
    Question,
    Sample,
    Verdict,
    check_depths,
    check_whole,
    rng_for,
)

POSITIVE, NEGATIVE = "positive", "negative"
EXISTS, EXISTS_NOT, INDEX, EXACT = "existence, positives", "existence, negatives", "index", "exact"


@dataclass(frozen=True)
class MMNeedle(NeedleProtocol):
    """A haystack of images, each stitched from grid x grid pictures; every other sample is a negative one.

    What a caption describes stands in the haystack once; in a negative sample it does not stand there at all, and the
    right answer is -1. With several needles an answer is right when it is for all of them.

    Args:
        grid: pictures a side of an image.
        needles: captions a question.
        picture_size: pixels a side of a picture.
        image_size: pixels a side of a stitched image, scaled to it; None: grid * picture_size.
        depths: the first needle stands in the image at these depths, samples of each; none: wherever the lot puts it.

    Reference:
        MMNeedle (arXiv 2406.11230), sections 3 and 4: task, answer format, existence, index and exact accuracy. Theirs
        are photographs of MS COCO with its captions, ours handwritten digits, "a red 7". Their script compares strings
        and takes whatever is not "-1" as the claim that there is a needle; here an answer that cannot be read is wrong.
    """

    grid: int = 2
    needles: int = 1
    picture_size: int = 128
    image_size: int | None = None
    depths: tuple[float, ...] = ()

    name: ClassVar[str] = "mmneedle"
    default_images: ClassVar[int] = 10

    def __post_init__(self) -> None:
        check_whole("grid", self.grid, 1, 32)
        check_whole("needles", self.needles, 1, COMBOS // 2)
        check_whole("picture_size", self.picture_size, 8, 2048)
        if self.image_size is not None:
            check_whole("image_size", self.image_size, 8, 16384)
        check_depths(self.depths)

    @property
    def max_new_tokens(self) -> int:
        return 16 + 16 * self.needles

    def check(self, images: int) -> None:
        check_whole("images", images, 1)
        cells = images * self.grid**2
        if self.needles > cells:
            raise InputError(
                f"needles={self.needles} in {images} images of {self.grid} x {self.grid}: wanted {cells} at most: "
                "more images, a larger grid or fewer needles"
            )

    def samples(self, images: int, count: int, seed: int) -> Iterator[Sample]:
        for depth in self.depths or (None,):
            for n in range(count):
                yield self._sample(images, depth, n, seed)

    def score(self, question: Question, answer: str) -> Verdict:
        places = parse_places(answer, self.needles, self.grid)
        absent = places is not None and set(places) == {ABSENT}
        if question.kind == NEGATIVE:
            return Verdict({EXISTS_NOT: absent}, places is not None)
        found = places is not None and not absent
        index = found and [p.image for p in places or ()] == [p.image for p in question.expected]
        right = {EXISTS: found, INDEX: index, EXACT: places == question.expected}
        return Verdict(right, places is not None)

    def chance(self, images: int) -> dict[str, float]:
        """Of somebody who says by a coin whether there are needles; index and exact: by lot among all places."""
        index = images**-self.needles
        exact = (images * self.grid**2) ** -self.needles
        return {EXISTS: 0.5, EXISTS_NOT: 0.5, INDEX: float(index), EXACT: float(exact)}

    def _sample(self, images: int, depth: float | None, n: int, seed: int) -> Sample:
        rng = rng_for(self.name, self.grid, self.needles, seed, images, depth, n)
        combos = rng.sample(range(COMBOS), COMBOS)
        asked, others = combos[: self.needles], combos[self.needles :]
        haystack = [rng.choice(others) for _ in range(images * self.grid**2)]
        cells = self._cells(rng, images, depth) if n % 2 == 0 else []
        for cell, combo in zip(cells, asked, strict=False):
            haystack[cell] = combo
        expected = tuple(self._place(cell) for cell in cells) or (ABSENT,) * self.needles
        kind = POSITIVE if cells else NEGATIVE
        question = Question(kind, self._instruction(images, asked), expected, depth if cells else None)
        pictures = rng.getrandbits(60)
        return Sample(images, (question,), lambda video: self._content(haystack, pictures))

    def _cells(self, rng: random.Random, images: int, depth: float | None) -> list[int]:
        """Where the needles stand, counted through the haystack."""
        area = self.grid**2
        if depth is None:
            return rng.sample(range(images * area), self.needles)
        first = round(depth * (images - 1)) * area + rng.randrange(area)
        others = [cell for cell in range(images * area) if cell != first]
        return [first, *rng.sample(others, self.needles - 1)]

    def _place(self, cell: int) -> Place:
        image, within = divmod(cell, self.grid**2)
        row, column = divmod(within, self.grid)
        return Place(image + 1, row + 1, column + 1)

    def _content(self, haystack: list[int], seed: int) -> Iterator[Part]:
        pictures = draw(haystack, seed, self.picture_size)
        while cells := list(islice(pictures, self.grid**2)):
            image = stitch(cells, self.grid)
            if self.image_size is not None:
                image = image.resize((self.image_size, self.image_size), Image.Resampling.LANCZOS)
            yield {"type": "image", "image": image}

    def _instruction(self, images: int, asked: list[int]) -> str:
        layout = (
            f"Above are {images} images, numbered 1 to {images} in this order, each divided into {self.grid} rows and "
            f"{self.grid} columns of sub-images. "
        )
        if self.needles == 1:
            return (
                f"{layout}Find the sub-image that the caption describes. Answer with 'index, row, column' and nothing "
                "else; '1, 2, 3' would mean the first image, second row, third column. If no sub-image fits the "
                f"caption, answer '-1' and nothing else.\nCaption: {caption(asked[0])}"
            )
        form = "; ".join(f"index_{k}, row_{k}, column_{k}" for k in range(1, self.needles + 1))
        captions = "\n".join(f"Caption_{k}: {caption(combo)}" for k, combo in enumerate(asked, 1))
        return (
            f"{layout}Find the sub-images that the {self.needles} captions describe. Answer with '{form}' and nothing "
            "else; '1, 2, 3' would mean the first image, second row, third column. Where no sub-image fits a caption, "
            f"put '-1' in its place.\n{captions}"
        )
