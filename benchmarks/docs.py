"""Writes the tables of README and docs, each of them one of the report's or a fact of the code.

Run as `python -m benchmarks.docs`. A table stands between `<!-- name -->` and `<!-- /name -->`. What presets were
measured to keep goes into the package first, `mminfer/measured.csv`, for the command line to tell.
"""

import argparse
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

from benchmarks.tables import calibrated, cost, needle, overview, presets, project, serving, tower
from mminfer.bench.protocols import Protocol

ROOT = Path(__file__).parents[1]
MEASURED = ROOT / "mminfer" / "measured.csv"
Sections = dict[str, Callable[[], str]]

QUOTED: Sections = {  # as they stand in the report
    "answers": cost.answers,
    "prompt_pass": cost.prompt_pass,
    "tower": tower.tower,
    "decode": cost.decode,
    "batch_decode": cost.batch_decode,
    "budgets": partial(needle.budgets, Protocol.NEXT_TURN),
    "tokens": partial(needle.by_length, "tokens", Protocol.NEXT_TURN),
    "composition": partial(needle.by_length, "composition", Protocol.NEXT_TURN),
    "positions": partial(needle.by_length, "positions", Protocol.NEXT_TURN),
    "long_context": cost.long_context,
}
PAGES: dict[str, Sections] = {  # by path from the root
    "README.md": {
        "techniques": overview.techniques,
        "families": project.families,
        "choices": presets.choices,
        "decoding": overview.decoding,
    },
    "docs/using.md": {"presets": presets.presets, "choices": presets.choices},
    "docs/techniques.md": {"support": project.support},
    "docs/results.md": QUOTED,
    "docs/calibrating.md": {"promises": calibrated.promises, "verdicts": calibrated.verdicts},
    "docs/serving.md": {"load": serving.load, "documents": serving.documents},
}


def render(page: str, text: str) -> str:
    """A page with every marked section written anew.

    Args:
        page: one of `PAGES`.
        text: what it says now.

    Raises:
        ValueError: a section's marks are not there, once each.
    """
    for name, section in PAGES[page].items():
        marked = re.compile(f"(?<=<!-- {name} -->\n).*?(?=<!-- /{name} -->)", re.DOTALL)
        if len(marked.findall(text)) != 1:
            raise ValueError(f"{page} has no section between <!-- {name} --> and <!-- /{name} -->")
        (start, end), content = marked.search(text).span(), section()
        text = f"{text[:start]}{content}\n{text[end:]}"
    return text


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    MEASURED.write_text(presets.measured())  # which the pages quote
    for page in PAGES:
        path = ROOT / page
        path.write_text(render(page, path.read_text()))


if __name__ == "__main__":
    main()
