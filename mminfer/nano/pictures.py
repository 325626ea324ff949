"""The pictures of the nano model's contexts: real handwritten digits, coloured and disturbed.

Digits are split by sample into "train" and "test", so test pictures show handwriting never seen in training.
Everything is a pure function of the random generator.
"""

from __future__ import annotations

import random
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F

IMAGE_SIZE = 32

COLOURS = {
    "red": (225, 45, 40),
    "green": (45, 200, 60),
    "blue": (60, 90, 245),
    "yellow": (235, 220, 45),
    "purple": (205, 60, 220),
    "cyan": (50, 220, 230),
}
COLOUR_NAMES = list(COLOURS)
DIGIT_NAMES = [str(d) for d in range(10)]


@cache
def load_digit_split(split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """8x8 digits in [0, 1] and their labels; 80% train / 20% test, stratified by class.

    Raises:
        ImportError: scikit-learn, which brings the digits, is not installed.
    """
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise ImportError(
            "scikit-learn is not installed, and the nano model's pictures are drawn from its digits: "
            "pip install mminfer[nano]"
        ) from error

    bunch = load_digits()
    train, test = train_test_split(np.arange(len(bunch.target)), test_size=0.2, random_state=0, stratify=bunch.target)
    index = {"train": train, "test": test}[split]
    images = torch.from_numpy(bunch.images[index]).float() / 16.0
    return images, torch.from_numpy(bunch.target[index]).long()


def render(digits: torch.Tensor, colours: torch.Tensor, split: str, generator: torch.Generator) -> torch.Tensor:
    """Draw a batch of pictures.

    A random handwriting sample of each digit is scaled, rotated, sheared and placed at random, then painted
    over a textured, noisy background with an optional grey distractor shape.

    Args:
        digits: the digit to show, integers in 0..9 [B].
        colours: the colour to show, indices into `COLOUR_NAMES` [B].
        split: "train" or "test" handwriting.
        generator: the only source of randomness.

    Returns:
        uint8 [B, 32, 32, 3].
    """
    n = len(digits)
    alpha = _draw_glyphs(digits, split, generator)
    image = draw_backgrounds(n, generator)
    palette = torch.tensor(list(COLOURS.values()), dtype=torch.float)
    paint = palette[colours] + _uniform(generator, n, 3, low=-20, high=20)
    image = image * (1 - alpha) + paint[:, :, None, None] * alpha
    image = image + torch.randn(n, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator) * 7.0
    return image.clamp(0, 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def _uniform(generator: torch.Generator, *shape: int, low: float = 0.0, high: float = 1.0) -> torch.Tensor:
    return low + (high - low) * torch.rand(*shape, generator=generator)


def _draw_glyphs(digits: torch.Tensor, split: str, g: torch.Generator) -> torch.Tensor:
    """Handwriting of the digits under a random affine map: opacity in [0, 1], [B, 1, 32, 32]."""
    n, s = len(digits), IMAGE_SIZE
    pool, labels = load_digit_split(split)
    pick = torch.empty(n, dtype=torch.long)
    for d in range(10):
        where = (digits == d).nonzero()[:, 0]
        candidates = (labels == d).nonzero()[:, 0]
        pick[where] = candidates[torch.randint(len(candidates), (len(where),), generator=g)]
    glyphs = pool[pick][:, None]  # [B, 1, 8, 8]

    scale = _uniform(g, n, low=20 / s, high=28 / s)  # a glyph's side is 20..28 pixels of 32
    angle = _uniform(g, n, low=-0.2, high=0.2)
    shear = _uniform(g, n, low=-0.15, high=0.15)
    aspect = _uniform(g, n, low=0.9, high=1.1)
    slack = (1 - scale).clamp_min(0)
    tx, ty = _uniform(g, n, low=-1, high=1) * slack, _uniform(g, n, low=-1, high=1) * slack
    cos, sin = torch.cos(angle), torch.sin(angle)
    a = torch.stack([cos / (scale * aspect), (sin + shear) / scale], 1)
    b = torch.stack([-sin / scale, cos * aspect / scale], 1)
    linear = torch.stack([a, b], 1)  # maps output coordinates to glyph coordinates
    offset = -(linear @ torch.stack([tx, ty], 1)[:, :, None])
    grid = F.affine_grid(torch.cat([linear, offset], 2), [n, 1, s, s], align_corners=False)
    alpha = F.grid_sample(glyphs, grid, mode="bicubic", padding_mode="zeros", align_corners=False)
    return (alpha * 1.25).clamp(0, 1)


def draw_backgrounds(n: int, g: torch.Generator) -> torch.Tensor:
    """A smooth tinted texture, in 40% of the pictures with a grey rectangle: [B, 3, 32, 32]."""
    s = IMAGE_SIZE
    coarse = _uniform(g, n, 3, 5, 5, low=-30, high=30) * 0.4 + _uniform(g, n, 1, 5, 5, low=-30, high=30)
    base = _uniform(g, n, 1, 1, 1, low=35, high=105)
    image = base + F.interpolate(coarse, size=(s, s), mode="bicubic", align_corners=False)

    ys, xs = torch.arange(s)[None, :, None], torch.arange(s)[None, None, :]
    x0, y0 = _uniform(g, n, 1, 1, high=s - 4), _uniform(g, n, 1, 1, high=s - 4)
    w, h = _uniform(g, n, 1, 1, low=3, high=9), _uniform(g, n, 1, 1, low=3, high=9)
    box = (xs >= x0) & (xs < x0 + w) & (ys >= y0) & (ys < y0 + h) & (_uniform(g, n, 1, 1) < 0.4)
    grey = _uniform(g, n, 1, 1, 1, low=20, high=170)
    return torch.where(box[:, None], grey, image)


class ImageBank:
    """Many rendered pictures, grouped by (digit, colour), for cheap sampling in training."""

    def __init__(self, per_combo: int, split: str = "train", seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        combos = torch.arange(60).repeat(per_combo)  # image i shows combo i % 60
        self.digits, self.colours = combos // 6, combos % 6
        chunks = zip(self.digits.split(3000), self.colours.split(3000), strict=True)
        self.pixels = torch.cat([render(d, c, split, generator) for d, c in chunks])
        self.per_combo = per_combo

    def sample(self, digit: int, colour: int, rng: random.Random) -> int:
        """Index of a random picture of that digit in that colour."""
        return rng.randrange(self.per_combo) * 60 + digit * 6 + colour
