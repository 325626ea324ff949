"""What README and docs hold that can be run: fenced blocks, and commands that stand in tables and sentences."""

import re
import textwrap
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PAGES = [
    *("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "mminfer/nano/README.md", "training/nano/README.md"),
    *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md")),
]
LANGUAGES = {"python": "python", "py": "python", "bash": "shell", "sh": "shell", "shell": "shell", "console": "shell"}
INERT = {"text", "json"}
LINK = re.compile(r"\]\(([^)\s]+)\)")
FENCE = re.compile(r"^(\s*)(`{3,}|~{3,})\s*([^\s`]*)")


class Block(NamedTuple):
    """A fenced block.

    Args:
        page: its file.
        line: the number of its first line there.
        language: as written behind the fence.
        text: without the fences.
        mark: the comment in the line before it, such as "test command"; "".
    """

    page: str
    line: int
    language: str
    text: str
    mark: str

    @property
    def name(self) -> str:
        return f"{self.page}:{self.line}"


def blocks_of(page: str, text: str) -> list[Block]:
    """All fenced blocks of a page."""
    found, lines, opened, fence = [], text.splitlines(), None, ""
    for number, line in enumerate(lines):
        match = FENCE.match(line)
        if match is None:
            continue
        if opened is None:
            opened, fence, language = number, match[2], match[3]
        elif line.strip() == fence:
            mark = re.fullmatch(r"<!-- (.*) -->", lines[opened - 1].strip()) if opened else None
            body = textwrap.dedent("\n".join(lines[opened + 1 : number])) + "\n"
            found.append(Block(page, opened + 2, language, body, mark[1] if mark else ""))
            opened = None
    if opened is not None:
        raise ValueError(f"{page}: the fence in line {opened + 1} is never closed")
    return found


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(kind: str) -> list[Block]:
    """Blocks of all pages that are "python" or "shell"."""
    return [block for page in PAGES for block in blocks_of(page, read(page)) if LANGUAGES.get(block.language) == kind]


def prose(text: str) -> str:
    """A page without its fenced blocks."""
    kept, inside = [], False
    for line in text.splitlines():
        if FENCE.match(line):
            inside = not inside
        elif not inside:
            kept.append(line)
    return "\n".join(kept)


def commands() -> list[tuple[str, ...]]:
    """The words of every command that stands in a table or a sentence: `mminfer ...` or `python -m ...`."""
    found = []
    for page in PAGES:
        for code in re.findall(r"`((?:mminfer|python -m) [^`]+)`", prose(read(page))):
            found.append(tuple(code.split()))
    return found


def anchors(text: str) -> set[str]:
    """What links to headings of a page may say behind the #."""
    heads = re.findall(r"^#+ (.*)$", prose(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}
