"""One picture of an image: its tokens as a grid over it, and what became of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from mminfer.inspection.colours import LEAST_STRIKE, SHADE, STRIKE, UNENCODED, Colour, dimness, group_colour, shade
from mminfer.inspection.facts import ImageFacts, Inspection, Rows

CELL = 24  # pixels a token's side should have, where the picture may grow or shrink to it
LEAST_SIDE, MOST_SIDE = 384, 1024  # pixels of a picture's longer side
GAP = 12  # pixels between the two grids of one image
FINE = 2  # drawn so much larger, then made smaller: smooth lines


@dataclass(frozen=True)
class Cells:
    """Where the cells of a grid lie on a picture of `width` x `height` pixels."""

    rows: int
    columns: int
    width: int
    height: int

    def box(self, row: int, column: int) -> tuple[int, int, int, int]:
        """Left, top, right and bottom, the last two one past."""
        across, down = (self._edge(i, self.columns, self.width) for i in (column, column + 1)), (row, row + 1)
        left, right = across
        top, bottom = (self._edge(i, self.rows, self.height) for i in down)
        return left, top, right, bottom

    @staticmethod
    def _edge(place: int, count: int, pixels: int) -> int:
        return round(place * pixels / count)


def picture_size(facts: ImageFacts, grid: Rows) -> tuple[int, int]:
    """Width and height in pixels of one grid's picture: its shape is the picture's, else the grid's."""
    rows, columns = grid.shape
    long = min(max(CELL * max(rows, columns), LEAST_SIDE), MOST_SIDE)
    width, height = (columns, rows) if facts.picture is None else facts.picture.size
    scale = long / max(width, height)
    return max(columns, round(width * scale)), max(rows, round(height * scale))


def draw_image(inspection: Inspection, place: int) -> Image.Image:
    """RGB: an image of the inspection, its grids side by side."""
    facts = inspection.images[place]
    parts = [draw_grid(inspection, facts, grid) for grid in facts.grids]
    width = sum(part.width for part in parts) + GAP * (len(parts) - 1)
    out = Image.new("RGB", (width, max(part.height for part in parts)), (255, 255, 255))
    left = 0
    for part in parts:
        out.paste(part, (left, 0))
        left += part.width + GAP
    return out


def plain_grid(facts: ImageFacts, grid: Rows, size: tuple[int, int]) -> Image.Image:
    """RGB: what lies under a grid; grey where the picture is not known."""
    if facts.picture is None:
        return Image.new("RGB", size, (205, 208, 214))
    return facts.picture.convert("RGB").resize(size, Image.Resampling.BICUBIC)


def draw_grid(inspection: Inspection, facts: ImageFacts, grid: Rows) -> Image.Image:
    """RGB: one grid over the picture."""
    size = picture_size(facts, grid)
    rows, columns = grid.shape
    cells = Cells(rows, columns, FINE * size[0], FINE * size[1])
    out = plain_grid(facts, grid, size).convert("RGBA")
    for paint in (_fills, _lines, _crosses, _strikes, _groups):  # the last ones lie on top
        layer = Image.new("RGBA", (cells.width, cells.height), (0, 0, 0, 0))
        paint(ImageDraw.Draw(layer), inspection, grid, cells)
        out.alpha_composite(layer.resize(size, Image.Resampling.BOX))
    return out.convert("RGB")


def _fills(draw: ImageDraw.ImageDraw, inspection: Inspection, grid: Rows, cells: Cells) -> None:
    """Shades by importance, then darkens what left early."""
    tokens, leaving, some_stay = inspection.tokens, inspection.leaving_layers, inspection.some_stay
    for (row, column), token in np.ndenumerate(grid):
        left, top, right, bottom = cells.box(row, column)
        rank = tokens.rank[token]
        amber = 0.0 if np.isnan(rank) else shade(float(rank))
        dim = dimness(int(tokens.left[tokens.owner[token]]), leaving, some_stay)
        draw.rectangle((left, top, right - 1, bottom - 1), fill=_over(SHADE, amber, dim))


def _over(colour: Colour, opacity: float, dim: float) -> tuple[int, int, int, int]:
    """A colour under the dark, as one colour with its opacity."""
    strength = opacity * (1 - dim)
    opacity = 1 - (1 - opacity) * (1 - dim)
    strength /= max(opacity, 1e-6)
    red, green, blue = (round(strength * c) for c in colour)
    return red, green, blue, round(255 * opacity)


def _lines(draw: ImageDraw.ImageDraw, inspection: Inspection, grid: Rows, cells: Cells) -> None:
    for row in range(cells.rows):
        for column in range(cells.columns):
            left, top, right, bottom = cells.box(row, column)
            draw.line((left, top, right, top), fill=(255, 255, 255, 70), width=FINE)
            draw.line((left, top, left, bottom), fill=(255, 255, 255, 70), width=FINE)


def _crosses(draw: ImageDraw.ImageDraw, inspection: Inspection, grid: Rows, cells: Cells) -> None:
    """Crosses cells that never went through the vision tower."""
    thick = _thickness(cells, 16, 2)
    for (row, column), token in np.ndenumerate(grid):
        if inspection.tokens.unencoded[token]:
            left, top, right, bottom = cells.box(row, column)
            for line in ((left, top, right, bottom), (left, bottom, right, top)):
                draw.line(line, fill=(*UNENCODED, 190), width=thick)


def _groups(draw: ImageDraw.ImageDraw, inspection: Inspection, grid: Rows, cells: Cells) -> None:
    """Outlines cells of merged tokens towards other groups, and marks where the merged token stands."""
    owner, group = inspection.tokens.owner, inspection.tokens.group
    for (row, column), token in np.ndenumerate(grid):
        if group[token] < 0:
            continue
        colour = (*group_colour(int(group[token])), 255)
        left, top, right, bottom = cells.box(row, column)
        thick = _thickness(cells, 12, 4)
        for down, across, edge in (
            (-1, 0, (left, top, right, top + thick)),
            (1, 0, (left, bottom - thick, right, bottom)),
            (0, -1, (left, top, left + thick, bottom)),
            (0, 1, (right - thick, top, right, bottom)),
        ):
            if _at(owner, grid, row + down, column + across) != owner[token]:
                draw.rectangle((edge[0], edge[1], edge[2] - 1, edge[3] - 1), fill=colour)
        if owner[token] == token:
            radius = _thickness(cells, 7, 10) + FINE
            x, y = (left + right) // 2, (top + bottom) // 2
            dot = (x - radius, y - radius, x + radius, y + radius)
            draw.ellipse(dot, fill=colour, outline=(0, 0, 0, 255), width=FINE)


def _thickness(cells: Cells, part: int, most: int) -> int:
    """Of a line, as drawn: that part of a cell's side, from one pixel of the picture to `most`."""
    side = min(cells.width // cells.columns, cells.height // cells.rows)
    return FINE * min(max(side // (FINE * part), 1), most)


def _at(owner: Rows, grid: Rows, row: int, column: int) -> int:
    if not (0 <= row < grid.shape[0] and 0 <= column < grid.shape[1]):
        return -1
    return int(owner[grid[row, column]])


def _strikes(draw: ImageDraw.ImageDraw, inspection: Inspection, grid: Rows, cells: Cells) -> None:
    """Strikes patches whose entries were evicted; the line's length says how many of them."""
    for (row, column), token in np.ndenumerate(grid):
        share = float(inspection.tokens.evicted[token])
        if share < LEAST_STRIKE:
            continue
        left, top, right, bottom = cells.box(row, column)
        inset = min(right - left, bottom - top) / 7
        x, y = left + inset, bottom - inset
        line = (x, y, x + share * (right - inset - x), y + share * (top + inset - y))
        thick = _thickness(cells, 10, 5)
        draw.line(line, fill=(0, 0, 0, 200), width=thick + 2 * FINE)
        draw.line(line, fill=(*STRIKE, 255), width=thick)
