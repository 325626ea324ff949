"""The part of the page with the pictures: legend, views, one figure an image."""

from __future__ import annotations

import base64
import io
import json
from typing import Any

import numpy as np
from PIL import Image

from mminfer.inspection.colours import SHADE, STRIKE, UNENCODED, css, dimness, group_colour, shade
from mminfer.inspection.drawing import draw_grid, picture_size, plain_grid
from mminfer.inspection.facts import ImageFacts, Inspection, Rows
from mminfer.inspection.words import image_names, image_sentence

# Pixels that a picture takes at least, by how many there are at most.
THUMBS = {2: 560, 6: 380, 24: 280}
LEAST_THUMB = 170


def pictures_html(inspection: Inspection) -> str:
    """The section, and its facts for the script."""
    if not inspection.images:
        return "<section><h2>Pictures</h2><p>There is no image in this prompt.</p></section>"
    thumb = next((side for most, side in THUMBS.items() if len(inspection.images) <= most), LEAST_THUMB)
    figures = "".join(
        _figure(inspection, facts, name, place)
        for place, (facts, name) in enumerate(zip(inspection.images, image_names(inspection), strict=True))
    )
    facts = json.dumps(_script_facts(inspection), separators=(",", ":"))
    return (
        f"<section><h2>Pictures</h2>{_legend(inspection)}{_views(inspection)}"
        f'<div class="pictures" style="--thumb:{thumb}px">{figures}</div></section>'
        f'<script type="application/json" id="facts">{facts}</script>'
    )


def _figure(inspection: Inspection, facts: ImageFacts, name: str, place: int) -> str:
    grids = "".join(_grid(inspection, facts, grid, name) for grid in facts.grids)
    kind = ' class="double"' if len(facts.grids) > 1 else ""
    return (
        f'<figure id="image-{place}"{kind}><div class="grids">{grids}</div>'
        f"<figcaption><b>{name}</b> {image_sentence(inspection, facts)}</figcaption></figure>"
    )


def _grid(inspection: Inspection, facts: ImageFacts, grid: Rows, name: str) -> str:
    marked = draw_grid(inspection, facts, grid)
    plain = plain_grid(facts, grid, marked.size)
    size = f'width="{marked.width}" height="{marked.height}" loading="lazy"'
    return (
        f'<div class="grid"><img class="marked" {size} alt="{name} with its tokens" src="{data_uri(marked)}">'
        f'<img class="plain" {size} alt="{name}" src="{data_uri(plain)}"><canvas></canvas></div>'
    )


def data_uri(picture: Image.Image) -> str:
    """A picture inside the page; JPEG, since a page may hold hundreds."""
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=86, subsampling=0)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _script_facts(inspection: Inspection) -> dict[str, Any]:
    tokens = inspection.tokens
    grids = []
    for facts in inspection.images:
        for grid in facts.grids:
            cells = grid.ravel()
            width, height = picture_size(facts, grid)
            gone = tokens.gone[:, cells].clip(0, 255).astype(np.uint8).tobytes() if inspection.evicts else b""
            grids.append(
                {
                    "rows": grid.shape[0],
                    "columns": grid.shape[1],
                    "width": width,
                    "height": height,
                    "entered": tokens.layers_entered[cells].tolist(),
                    "gone": base64.b64encode(gone).decode() or None,
                }
            )
    told = [
        f"layer {i}: {layer.rows:,} of {layer.full_rows:,} tokens, {layer.entries:,} cache entries"
        for i, layer in enumerate(inspection.layers)
    ]
    return {"heads": min(tokens.num_heads, 255), "strike": css(STRIKE), "layers": told, "grids": grids}


def _views(inspection: Inspection) -> str:
    last = len(inspection.layers) - 1
    return f"""<div class="views" role="group" aria-label="What the pictures show">
<label><input type="radio" name="view" value="marked" checked> all marks</label>
<label><input type="radio" name="view" value="plain"> pictures alone</label>
<label><input type="radio" name="view" value="layer"> one layer</label>
<label><input type="range" id="layer" min="0" max="{last}" value="0" aria-label="layer"></label>
<span class="soft" id="layer-told"></span></div>
<p class="soft">Press on a picture to make it larger. In the view of one layer, dark: no token of the patch enters the
layer; struck: heads of this layer that hold its entry no longer.</p>"""


def _legend(inspection: Inspection) -> str:
    items = [_shade_key(inspection)]
    tokens = inspection.tokens
    if tokens.unencoded.any():
        items.append(_cross_key())
    if (tokens.group >= 0).any():
        items.append(_group_key(bool((tokens.image != tokens.image[tokens.owner]).any())))
    if inspection.leaving_layers:
        items.append(_dim_key(inspection))
    if inspection.evicts:
        keys = _key(_line(0.25), "a quarter") + _key(_line(0.5), "half") + _key(_line(1), "all")
        items.append(_item(keys, "Struck: cache entries of its token that were evicted, over all layers and heads."))
    return f'<ul class="legend">{"".join(items)}</ul>'


def _item(keys: str, text: str) -> str:
    shown = f'<span class="keys">{keys}</span>' if keys else ""
    return f"<li>{shown}<span>{text}</span></li>"


def _key(inside: str, label: str) -> str:
    return f'<span class="key"><i>{inside}</i>{label}</span>'


def _fill(colour: str) -> str:
    return f'<em style="background:{colour}"></em>'


def _shade_key(inspection: Inspection) -> str:
    if not inspection.importance_from:
        return _item("", "No shading: these settings weigh no token.")
    ranks = {"least": 0.0, "middle": 0.5, "most": 1.0}
    keys = "".join(_key(_fill(css(SHADE, shade(rank))), name) for name, rank in ranks.items())
    text = f"Amber: {inspection.importance_from}, by rank among all visual tokens of the prompt."
    early = " Where all queries count, early tokens have more to look at them."
    return _item(keys, text + (early if inspection.importance_from.startswith("score") else ""))


def _cross_key() -> str:
    drawn = (
        f'<svg viewBox="0 0 30 30"><path d="M2 2L28 28M2 28L28 2" stroke="{css(UNENCODED)}" stroke-width="2"/></svg>'
    )
    return _item(_key(drawn, "repeats"), "Crossed: never went through the vision tower; another patch stands for it.")


def _group_key(across: bool) -> str:
    colour = css(group_colour(0))
    box = f'fill="none" stroke="{colour}" stroke-width="3"'
    drawn = (
        f'<svg viewBox="0 0 30 30"><path d="M2 2H28V15H15V28H2Z" {box}/>'
        f'<circle cx="9" cy="21" r="4" fill="{colour}" stroke="#000"/></svg>'
    )
    text = (
        "Outlines of one colour in a picture: patches that became one token; the dot is where it stands. Without an "
        "outline, a patch is a token of its own. Colours return in pictures with many groups."
    )
    return _item(_key(drawn, "merged"), text + (" A group may reach into the neighbouring frame." if across else ""))


def _dim_key(inspection: Inspection) -> str:
    leaving, some_stay = inspection.leaving_layers, inspection.some_stay
    shown = leaving if len(leaving) <= 8 else (*leaving[:3], *leaving[-3:])
    keys = "".join(
        _key(_fill(f"rgb(0 0 0 / {dimness(layer, leaving, some_stay):.2f})"), f"layer {layer}") for layer in shown
    )
    text = "Dark: its token left the model behind that layer, the darker the earlier."
    if some_stay:
        keys += _key("", "never")
    return _item(keys, text)


def _line(share: float) -> str:
    x, y = 4 + 22 * share, 26 - 22 * share
    path = f"M4 26L{x} {y}"
    return (
        f'<svg viewBox="0 0 30 30"><path d="{path}" stroke="#000" stroke-width="6"/>'
        f'<path d="{path}" stroke="{css(STRIKE)}" stroke-width="3.5"/></svg>'
    )
