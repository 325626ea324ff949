"""Colours and strengths that pictures, page and legend share."""

from __future__ import annotations

import colorsys

Colour = tuple[int, int, int]

SHADE: Colour = (255, 176, 0)
STRIKE: Colour = (255, 45, 120)
UNENCODED: Colour = (40, 110, 255)
MOST_SHADE = 0.42  # opacity over the most important patch
LEAST_DIM, MOST_DIM = 0.25, 0.62  # opacity of the dark over patches that left last and first
LEAST_STRIKE = 0.02  # below this share nothing is struck
_HUES = 8


def group_colour(number: int) -> Colour:
    """Colour of the so-manieth merged group of an image; neighbours in number lie far apart."""
    hue = number * 3 % _HUES / _HUES
    lightness = 0.68 if number // _HUES % 2 else 0.55
    red, green, blue = colorsys.hls_to_rgb(hue, lightness, 0.95)
    return round(255 * red), round(255 * green), round(255 * blue)


def shade(rank: float) -> float:
    """Opacity over a patch of this rank (0..1); the lower half of the ranks leaves the picture nearly as it is."""
    return MOST_SHADE * rank**2


def dimness(left: int, leaving: tuple[int, ...], some_stay: bool) -> float:
    """Opacity of the dark over a patch whose token left behind a layer; 0 where it left behind none (-1).

    Args:
        left: that layer.
        leaving: layers behind which any token left.
        some_stay: whether any visual token goes through all layers; then even the last to leave are darker than those.
    """
    if left < 0:
        return 0.0
    later = sum(layer > left for layer in leaving) + some_stay
    return LEAST_DIM + (MOST_DIM - LEAST_DIM) * later / max(len(leaving) + some_stay - 1, 1)


def css(colour: Colour, opacity: float = 1.0) -> str:
    """As CSS writes it."""
    return f"rgb({colour[0]} {colour[1]} {colour[2]} / {opacity:.2f})"
