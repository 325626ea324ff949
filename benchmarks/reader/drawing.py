"""Draws pages as the reader's tower was trained on: nine typewriter places to a cell, ink, paper, noise.

The fonts are matplotlib's DejaVu, so that every machine draws the same page of the same seed.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFilter, ImageFont

from benchmarks.reader.grid import COLUMNS, ROWS, TEXT, Area, Page

CELL_HEIGHT, CELL_WIDTH = 28, 56
HEIGHT, WIDTH = ROWS * CELL_HEIGHT, COLUMNS * CELL_WIDTH
PITCH = CELL_WIDTH / 9  # a token with a space in front leaves the first place free
FONTS = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSerif", "DejaVuSansMono", "DejaVuSansMono-Bold")
SIZES, TALL_SIZES = (14, 15, 16, 17), (29, 31, 33)
WIDE = "mwMW"
RGB = {
    "red": (205, 40, 40),
    "blue": (40, 70, 205),
    "green": (35, 145, 55),
    "yellow": (240, 218, 50),
    "purple": (128, 45, 160),
    "orange": (242, 138, 30),
    "pink": (246, 150, 190),
    "brown": (122, 76, 38),
    "black": (22, 22, 26),
    "gray": (140, 140, 142),
}

Style = tuple[str, int]  # path of a font, size
Glyph = tuple[np.ndarray, int, int]  # uint8 mask [h, w], its left and top from the place's left end of the base line


class Renderer:
    """Draws one page after the other; what it draws depends on the seed and on the pages so far.

    Args:
        tokenizer: says what is written in a cell.
        seed: of ink, paper, fonts and noise.
    """

    def __init__(self, tokenizer: Any, seed: int) -> None:
        self._tokenizer = tokenizer
        self._rng, self._noise_rng = random.Random(seed), np.random.default_rng(seed)
        self._styles = [(str(font_folder() / f"{name}.ttf"), size) for name in FONTS for size in SIZES]
        self._glyphs: dict[tuple[str, int, str], Glyph] = {}

    def draw(self, page: Page) -> Image.Image:
        """An RGB image of 448 x 224 pixels."""
        ink, paper = self._colours()
        mask = np.zeros((HEIGHT, WIDTH), np.uint8)
        self._write_text(mask, page)
        self._write_headlines(mask, page)
        strength = mask.astype(np.float32)[..., None] * (self._rng.uniform(0.8, 1) / 255)
        pixels = paper + strength * (ink - paper)
        for area in page.areas:
            self._paint(pixels, area)
        return self._worn(pixels)

    def _colours(self) -> tuple[np.ndarray, np.ndarray]:
        """Dark ink, light paper."""
        rng = self._rng
        dark, light = rng.randint(0, 75), rng.randint(215, 255)
        ink = [max(0, dark + rng.randint(-25, 25)) for _ in range(3)]
        if rng.random() < 0.25:
            ink = rng.sample([rng.randint(0, 60), rng.randint(0, 60), rng.randint(60, 150)], 3)
        paper = [min(255, light + rng.randint(-14, 8)) for _ in range(3)]
        return np.array(ink, np.float32), np.array(paper, np.float32)

    def _write_text(self, mask: np.ndarray, page: Page) -> None:
        rng = self._rng
        change = 0.5 if rng.random() < 0.3 else 0.08  # of the font, from line to line
        style, base = rng.choice(self._styles), rng.randint(18, 20)
        shake, shift = rng.choice((0, 0, 1)), rng.uniform(0, 0.9)
        for row in range(ROWS):
            if rng.random() < change:
                style = rng.choice(self._styles)
            for column in range(COLUMNS):
                if page.kinds[row][column] == TEXT:
                    y = row * CELL_HEIGHT + base + rng.randint(-shake, shake)
                    left = column * CELL_WIDTH + shift
                    self._write_token(mask, page.tokens[row][column], style, PITCH, (left, y))

    def _write_headlines(self, mask: np.ndarray, page: Page) -> None:
        rng = self._rng
        path, shake, shift = rng.choice(self._styles)[0], rng.choice((0, 0, 1)), rng.uniform(0, 1.5)
        for headline in page.headlines:
            style = path, rng.choice(TALL_SIZES)
            y = headline.row * CELL_HEIGHT + rng.randint(38, 40) + rng.randint(-shake, shake)
            left = headline.column * CELL_WIDTH + shift
            self._write_token(mask, headline.token, style, int(PITCH), (left, y))

    def _write_token(
        self, mask: np.ndarray, token: int, style: Style, pitch: float, origin: tuple[float, float]
    ) -> None:
        """Puts a token's characters into their places; origin: left end and base line of its cell."""
        text, (left, base) = self._tokenizer.decode([token]), origin
        for place, character in enumerate(text.strip(), int(text.startswith(" "))):
            glyph, offset, rise = self._glyph(*style, character)
            x, y = int(left + place * pitch) + offset, max(0, int(base) + rise)
            there = mask[y : y + glyph.shape[0], x : x + glyph.shape[1]]
            np.maximum(there, glyph[: there.shape[0], : there.shape[1]], out=there)

    def _glyph(self, path: str, size: int, character: str) -> Glyph:
        """A character squeezed into a place of six pixels."""
        key = path, size, character
        if key not in self._glyphs:
            font = ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.BASIC)
            drawn, (_, rise) = font.getmask2(character, "L", anchor="ls")
            mask = np.array(drawn, np.uint8).reshape(drawn.size[::-1]) if all(drawn.size) else np.zeros((1, 1), "u1")
            least = 2 if size in TALL_SIZES else 1
            width = 6 if mask.shape[1] >= 6 or character in WIDE else max(least, mask.shape[1])
            if width != mask.shape[1]:
                narrower = width < mask.shape[1]
                how = Image.Resampling.BOX if narrower else Image.Resampling.BILINEAR
                mask = np.asarray(Image.fromarray(mask).resize((width, mask.shape[0]), how))
                if narrower:  # thin strokes keep their ink
                    mask = np.minimum(255, mask.astype(np.int32) * 5 // 4).astype(np.uint8)
            self._glyphs[key] = mask, (6 - width + 1) // 2, rise
        return self._glyphs[key]

    def _paint(self, pixels: np.ndarray, area: Area) -> None:
        """An area that is even, shaded or grainy."""
        rng, height, width = self._rng, area.rows * CELL_HEIGHT, area.columns * CELL_WIDTH
        ground = np.broadcast_to(self._shade(area.colour), (height, width, 3)).copy()
        kind = rng.random()
        if kind < 0.5:
            length = width if kind < 0.3 else height
            light = np.linspace(1, rng.uniform(0.75, 1.15), length, dtype=np.float32)
            ground *= light[None, :, None] if kind < 0.3 else light[:, None, None]
        elif kind < 0.7:
            grain = self._noise_rng.standard_normal((height, width, 1), dtype=np.float32)
            ground += rng.uniform(4, 16) * grain
        y, x = area.row * CELL_HEIGHT, area.column * CELL_WIDTH
        pixels[y : y + height, x : x + width] = ground

    def _shade(self, colour: str) -> np.ndarray:
        """About this colour."""
        return np.array([min(255, max(0, c + self._rng.randint(-18, 18))) for c in RGB[colour]], np.float32)

    def _worn(self, pixels: np.ndarray) -> Image.Image:
        """Uneven light, noise and a soft focus, on some pages."""
        rng = self._rng
        if rng.random() < 0.3:
            light = np.linspace(1, rng.uniform(0.85, 1), WIDTH, dtype=np.float32)
            pixels = pixels * (light if rng.random() < 0.5 else light[::-1])[None, :, None]
        if rng.random() < 0.7:
            noise = self._noise_rng.standard_normal(pixels.shape, dtype=np.float32)
            pixels = pixels + rng.uniform(0, 9) * noise
        image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
        return image.filter(ImageFilter.GaussianBlur(rng.uniform(0.2, 0.65))) if rng.random() < 0.25 else image


def font_folder() -> Path:
    """Where matplotlib keeps its fonts."""
    import matplotlib

    return Path(matplotlib.get_data_path()) / "fonts" / "ttf"
