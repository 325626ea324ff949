"""Sheets for the vision tower: pages of text, slides, forms and photographs, drawn alike on every machine of one seed.

Unlike the pages that the reader was trained on they are clean, as files are that were never printed: their paper is of
one colour.
"""

import random
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from benchmarks.reader.drawing import font_folder

Draw = Callable[[ImageDraw.ImageDraw, random.Random, tuple[int, int]], None]
INK = (20, 20, 24)


def sheet(kind: str, size: tuple[int, int], seed: int) -> Image.Image:
    """An RGB image.

    Args:
        kind: one of `KINDS`.
        size: width and height in pixels.
        seed: of what stands on it.
    """
    rng = random.Random(f"{kind} {seed}")
    if kind == PHOTO:
        noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        return Image.fromarray(noise)
    paper = (255, 255, 255) if kind != "slide" else (24, 44, 92)
    image = Image.new("RGB", size, paper)
    DRAWN[kind](ImageDraw.Draw(image), rng, size)
    return image


def _font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    path = font_folder() / f"DejaVuSans{'-Bold' if bold else ''}.ttf"
    return ImageFont.truetype(str(path), size, layout_engine=ImageFont.Layout.BASIC)


def _words(rng: random.Random, count: int) -> str:
    letters = "etaoinshrdlucmfwypvbgk"
    return " ".join("".join(rng.choices(letters, k=rng.randint(2, 9))) for _ in range(count))


def _line(draw: ImageDraw.ImageDraw, rng: random.Random, place: tuple[int, int], width: int, size: int) -> None:
    """A line of words that ends before the width does."""
    font, words = _font(size), _words(rng, 30).split()
    while words and draw.textlength(" ".join(words), font) > width:
        words.pop()
    draw.text(place, " ".join(words), INK, font)


def _text(draw: ImageDraw.ImageDraw, rng: random.Random, size: tuple[int, int]) -> None:
    """Paragraphs over the whole page, margins around them."""
    width, height = size
    left, top, step = width // 9, height // 11, max(12, height // 64)
    draw.text((left, top), _words(rng, 4), INK, _font(2 * step, True))
    y = top + 4 * step
    while y < height - top:
        lines = rng.randint(4, 9)
        for line in range(lines):
            if y < height - top:
                full = width - 2 * left
                _line(draw, rng, (left, y), full if line < lines - 1 else rng.randint(full // 4, full), step)
            y += round(1.5 * step)
        y += step


def _slide(draw: ImageDraw.ImageDraw, rng: random.Random, size: tuple[int, int]) -> None:
    """A heading, a few points, a box."""
    width, height = size
    step = height // 18
    draw.text((width // 12, step), _words(rng, 3), (250, 250, 250), _font(2 * step, True))
    for point in range(4):
        y = 5 * step + 2 * step * point
        draw.ellipse((width // 12, y + step // 3, width // 12 + step // 3, y + 2 * step // 3), fill=(255, 190, 40))
        draw.text((width // 9, y), _words(rng, rng.randint(2, 4)), (235, 238, 245), _font(step))
    draw.rectangle((width * 2 // 3, height * 3 // 4, width - step, height - step), fill=(60, 140, 120))


def _form(draw: ImageDraw.ImageDraw, rng: random.Random, size: tuple[int, int]) -> None:
    """Labelled boxes, most of them empty."""
    width, height = size
    step = max(12, height // 64)
    for y in range(height // 12, height - height // 12, 4 * step):
        for x in (width // 10, width * 11 // 20):
            draw.text((x, y), _words(rng, 2), INK, _font(step))
            draw.rectangle((x, y + round(1.4 * step), x + width * 7 // 20, y + 3 * step), outline=INK)
            if rng.random() < 0.3:
                draw.text((x + 6, y + round(1.6 * step)), _words(rng, 2), INK, _font(step))


PHOTO = "nothing repeats"
DRAWN: dict[str, Draw] = {"text": _text, "slide": _slide, "form": _form}
KINDS = (*DRAWN, PHOTO)
