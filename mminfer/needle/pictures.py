"""The pictures of all protocols: coloured handwritten digits, drawn as they are taken."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

import torch
from PIL import Image

from mminfer.errors import InputError
from mminfer.nano.pictures import COLOUR_NAMES, DIGIT_NAMES, IMAGE_SIZE, load_digit_split, render

COLOURS = len(COLOUR_NAMES)
COMBOS = COLOURS * len(DIGIT_NAMES)  # a combo is digit * COLOURS + colour
CHUNK = 64  # drawn at once; pictures depend on it


def check_available() -> None:
    """Raises `InputError` if what brings the handwriting is not installed."""
    try:
        load_digit_split("test")
    except ImportError as error:
        raise InputError(str(error)) from error


def caption(combo: int) -> str:
    """What a picture shows, in words."""
    return f"a {COLOUR_NAMES[combo % COLOURS]} {combo // COLOURS}"


def draw(combos: Iterable[int], seed: int, side: int) -> Iterator[Image.Image]:
    """Pictures one after the other; no more than a chunk of them is held.

    Args:
        combos: what they show.
        seed: of handwriting, place, texture and noise.
        side: pixels of a picture, scaled up from `IMAGE_SIZE`.
    """
    generator = torch.Generator().manual_seed(seed)
    remaining = iter(combos)
    while chunk := list(islice(remaining, CHUNK)):
        shown = torch.tensor(chunk)
        for pixels in render(shown // COLOURS, shown % COLOURS, "test", generator):
            picture = Image.fromarray(pixels.numpy())
            yield picture if side == IMAGE_SIZE else picture.resize((side, side), Image.Resampling.BICUBIC)


def stitch(cells: Sequence[Image.Image], grid: int) -> Image.Image:
    """One image of grid x grid cells of one size, row by row."""
    side = cells[0].width
    image = Image.new("RGB", (grid * side, grid * side))
    for n, cell in enumerate(cells):
        row, column = divmod(n, grid)
        image.paste(cell, (column * side, row * side))
    return image
