"""Writes the README's tables, each of them one of the report's or a fact of the code: python -m benchmarks.readme"""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

from benchmarks.tables import cost, needle, project
from mminfer.bench.protocols import Protocol

README = Path(__file__).parents[1] / "README.md"

QUOTED: dict[str, Callable[[], str]] = {  # as they stand in the report
    "answers": cost.answers,
    "prompt_pass": cost.prompt_pass,
    "decode": cost.decode,
    "budgets": partial(needle.budgets, Protocol.NEXT_TURN),
    "tokens": partial(needle.by_length, "tokens", Protocol.NEXT_TURN),
    "composition": partial(needle.by_length, "composition", Protocol.NEXT_TURN),
    "positions": partial(needle.by_length, "positions", Protocol.NEXT_TURN),
    "long_context": cost.long_context,
}
SECTIONS: dict[str, Callable[[], str]] = {
    **QUOTED,
    "families": project.families,
    "support": project.support,
    "presets": project.presets,
}


def render(text: str) -> str:
    """The README with every marked section written anew.

    Raises:
        ValueError: a section's marks are not there, once each.
    """
    for name, section in SECTIONS.items():
        marked = re.compile(f"(?<=<!-- {name} -->\n).*?(?=<!-- /{name} -->)", re.DOTALL)
        if len(marked.findall(text)) != 1:
            raise ValueError(f"the README has no section between <!-- {name} --> and <!-- /{name} -->")
        (start, end), content = marked.search(text).span(), section()
        text = f"{text[:start]}{content}\n{text[end:]}"
    return text


def main() -> None:
    README.write_text(render(README.read_text()))


if __name__ == "__main__":
    main()
