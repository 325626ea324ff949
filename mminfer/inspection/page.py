"""One page that needs nothing beside itself: no file, no network."""

from __future__ import annotations

import base64
import hashlib
import json
from html import escape

from mminfer.inspection.facts import Inspection
from mminfer.inspection.page_pictures import pictures_html
from mminfer.inspection.page_script import SCRIPT
from mminfer.inspection.page_style import STYLE
from mminfer.inspection.page_tables import layers_html, text_html
from mminfer.inspection.words import percent, sentences


def page_html(inspection: Inspection, title: str = "") -> str:
    """The page of an inspection.

    Args:
        inspection: what was found.
        title: the settings' name.
    """
    head = f"mminfer inspect: {title}" if title else "mminfer inspect"
    # Whatever a prompt or an answer says, a browser runs this script alone and fetches nothing.
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src '{_digest(SCRIPT)}'"
    script = f"<script>{SCRIPT}</script>" if inspection.images else ""
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{escape(head)}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<style>{STYLE}</style></head>
<body data-view="marked"><main>
<h1>{escape(head)} <small>on {escape(inspection.model)}</small></h1>
{_summary(inspection)}
{pictures_html(inspection)}
{layers_html(inspection)}
{text_html(inspection)}
{_settings(inspection)}
</main>{script}</body></html>
"""


def _digest(script: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _summary(inspection: Inspection) -> str:
    stats, full = inspection.stats, inspection.full_stats
    rows, full_rows = (sum(s.layer_rows) for s in (stats, full))
    tiles = {
        "of the prompt's FLOPs": percent(stats.prompt_flops, full.prompt_flops),
        "of the cache's bytes": percent(stats.cache_bytes, full.cache_bytes),
        "of the tokens, over all layers": percent(rows, full_rows),
        f"of {stats.prompt_tokens:,} tokens enter layer 0": f"{stats.merged_tokens:,}",
        "KL of the first token, nats": f"{inspection.first_token_kl:.2g}",
    }
    shown = "".join(f'<div class="tile"><b>{value}</b><span>{name}</span></div>' for name, value in tiles.items())
    done = "".join(f"<li>{escape(sentence)}</li>" for sentence in sentences(inspection))
    same = "the same" if inspection.answer == inspection.full_answer else "another"
    answers = (
        f"<div><b>Answer with these settings</b>{escape(inspection.answer) or '(empty)'}</div>"
        f"<div><b>Answer of the full model ({same})</b>{escape(inspection.full_answer) or '(empty)'}</div>"
    )
    return (
        f'<section><h2>What was done, and what came of it</h2><ul>{done}</ul><div class="tiles">{shown}</div>'
        f'<div class="answers">{answers}</div></section>'
    )


def _settings(inspection: Inspection) -> str:
    text = escape(json.dumps(inspection.settings, indent=2))
    return (
        '<section><h2>Settings</h2><p class="soft">As JSON: pass them again with --config FILE.</p>'
        f"<pre>{text}</pre></section>"
    )
