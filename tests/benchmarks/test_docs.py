"""README, docs and report tell the truth: their tables are those of the stored rows."""

from pathlib import Path

import pytest

from benchmarks import report
from benchmarks.docs import MEASURED, PAGES, QUOTED, render
from benchmarks.tables import presets

ROOT = Path(__file__).parents[2]
SECTIONS = [(page, name) for page, sections in PAGES.items() for name in sections]


@pytest.mark.parametrize(("page", "name"), SECTIONS)
def test_generated_sections_are_there(page, name):
    assert f"<!-- {name} -->" in (ROOT / page).read_text()


@pytest.mark.parametrize("page", PAGES)
def test_generated_sections_are_current(page):
    text = (ROOT / page).read_text()
    assert render(page, text) == text


def test_what_presets_kept_is_what_the_rows_say():
    assert presets.measured() == MEASURED.read_text()


def test_no_page_has_a_section_that_nothing_writes():
    """Other comments are of one piece: only generated sections are closed."""
    for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        page = path.relative_to(ROOT).as_posix()
        closed = {line[6:-4] for line in path.read_text().splitlines() if line.startswith("<!-- /")}
        assert closed == set(PAGES.get(page, {})), page


def test_a_page_without_its_section_is_refused():
    with pytest.raises(ValueError, match="no section"):
        render("docs/using.md", "# Using\n")


def test_the_report_is_current():
    assert report.render() == report.REPORT.read_text()


@pytest.mark.parametrize("name", QUOTED)
def test_the_docs_quote_the_report(name):
    assert QUOTED[name]() in report.REPORT.read_text()
