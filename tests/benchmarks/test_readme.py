"""README and report tell the truth: their tables are those of the stored rows, the test command is the one CI runs."""

import os
import subprocess
from pathlib import Path

import pytest

from benchmarks import report
from benchmarks.readme import QUOTED, SECTIONS, render

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("name", SECTIONS)
def test_generated_sections_are_current(name):
    assert f"<!-- {name} -->" in README
    assert render(README) == README


def test_the_report_is_current():
    assert report.render() == report.REPORT.read_text()


@pytest.mark.parametrize("name", QUOTED)
def test_the_readme_quotes_the_report(name):
    assert QUOTED[name]() in report.REPORT.read_text()


def test_ci_runs_the_readmes_test_command(tmp_path):
    """CI takes the command out of the README; here everything but the printing is cut off."""
    script = (ROOT / ".ci/run").read_text().replace('eval "$command"', "")
    (tmp_path / ".ci").mkdir()
    (tmp_path / ".ci/run").write_text(script)
    (tmp_path / "README.md").write_text(README)
    out = subprocess.run(["bash", ".ci/run"], cwd=tmp_path, capture_output=True, text=True, check=True, env=os.environ)
    assert out.stdout.strip().endswith(".venv/bin/python -m pytest")
    assert out.stdout.startswith("python3 -m venv .venv")


def test_the_python_examples_run():
    """The first example of the README, as it stands."""
    code = README.split("```python\n")[1].split("```")[0]
    scope: dict = {}
    exec(code, scope)
    assert scope["out"].text == "WB"
