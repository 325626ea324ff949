"""The parts of the page with figures and text: layers beside the full model's, and the words of the prompt."""

from __future__ import annotations

from html import escape
from itertools import groupby

from mminfer.inspection.facts import Inspection, LayerFacts
from mminfer.inspection.words import image_names, percent
from mminfer.metrics.memory import show_bytes


def layers_html(inspection: Inspection) -> str:
    """A row for each layer."""
    most_rows = max(layer.full_rows for layer in inspection.layers)
    most_entries = max(layer.full_entries for layer in inspection.layers)
    rows = []
    for i, layer in enumerate(inspection.layers):
        rows.append(
            f"<tr><td>{i}</td>"
            f"<td>{_bar(layer.rows, most_rows)}{layer.rows:,} of {layer.full_rows:,}</td>"
            f"<td>{_bar(layer.entries, most_entries)}{layer.entries:,} of {layer.full_entries:,}{_heads(layer)}</td>"
            f"<td>{show_bytes(layer.cache_bytes)} of {show_bytes(layer.full_cache_bytes)}</td>"
            f"<td>{f'{layer.left:,}' if layer.left else ''}</td>"
            f"<td>{', '.join(layer.skipped)}</td></tr>"
        )
    names = ("layer", "tokens that enter", "cache entries a head", "cache", "leave behind it", "visual tokens skip")
    head = "".join(f"<th>{name}</th>" for name in names)
    return (
        '<section><h2>Layers</h2><p class="soft">Blue: with these settings; grey: what the full model has.</p>'
        f'<div class="wide"><table><tr>{head}</tr>{"".join(rows)}</table></div></section>'
    )


def _heads(layer: LayerFacts) -> str:
    """The entries of each head, where they differ."""
    if len(set(layer.head_entries)) == 1:
        return ""
    return f'<br><small class="soft">heads: {", ".join(f"{n:,}" for n in layer.head_entries)}</small>'


def _bar(part: int, whole: int) -> str:
    return f'<span class="bar"><i style="width:{100 * part / max(whole, 1):.1f}%"></i></span>'


def text_html(inspection: Inspection) -> str:
    """The prompt's text in order, with a chip in the place of each image."""
    tokens, names = inspection.tokens, image_names(inspection)
    shares = [round(float(share), 2) for share in tokens.evicted]
    pieces, seen = [], set()
    for (image, share, mark), of_run in groupby(
        range(len(tokens)), key=lambda i: (int(tokens.image[i]), shares[i], _is_mark(inspection.texts[i]))
    ):
        if image < 0:
            pieces.append(_words("".join(inspection.texts[i] for i in of_run), share, mark))
        elif image not in seen:
            seen.add(image)
            count = len(inspection.images[image].tokens)
            pieces.append(f'<a class="chip" href="#image-{image}">{names[image].lower()}, {count} patches</a>')
    struck = int(((tokens.evicted > 0) & (tokens.image < 0)).sum())
    text = int((tokens.image < 0).sum())
    told = (
        f"Struck words lost cache entries: {struck:,} of {text:,} text tokens, each with its share of layers and heads."
        if struck
        else f"None of the {text:,} text tokens lost a cache entry to these settings."
    )
    return (
        f'<section><h2>Text of the prompt</h2><p class="soft">{told}</p><div class="strip">{"".join(pieces)}</div>'
        "</section>"
    )


def _is_mark(text: str) -> bool:
    """Whether this looks like a special token."""
    return len(text) > 2 and text[0] in "<[" and text[-1] in ">]" and " " not in text


def _words(text: str, share: float, mark: bool) -> str:
    shown = escape(text)
    if mark:
        shown = f'<span class="mark">{shown}</span>'
    return f"<s>{shown}</s><sub>{percent(share, 1)}</sub>" if share else shown
