"""Every example runs as it stands, on the bundled model."""

import ast
import os
import subprocess
from pathlib import Path

import pytest

from tests.preloaded import python

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
TOLD = {  # what they print, among other things
    "quick_start": ["WB\n", "rows in each layer: (504, "],
    "chat_over_documents": ["a blue 1? WB\n", "image MK? 4\n", "code of nest? 66\n"],
    "long_video": ["2122 tokens read"],
    "patch_a_model": ["before:  WB\n", "patched: WB - rows in each layer: [504, ", "after:   WB\n"],
}


def run(path, folder, *arguments):
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]), "OMP_NUM_THREADS": "1"}
    command = [*python(), str(path), *arguments]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_run(path, tmp_path):
    done = run(path, tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    assert [told for told in TOLD.get(path.stem, []) if told not in done.stdout] == [], done.stdout


@pytest.mark.slow
def test_examples_take_a_model(tmp_path):
    done = run(ROOT / "examples/quick_start.py", tmp_path, "--model", str(tmp_path / "nothing"))
    assert done.returncode != 0 and "InputError: no model at" in done.stderr


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_say_what_they_are(path):
    text = path.read_text(encoding="utf-8")
    told = ast.get_docstring(ast.parse(text))
    assert told and f"python examples/{path.name}" in told
    assert '"--model", default="nano"' in text


def test_examples_are_there():
    assert set(TOLD) <= {path.stem for path in EXAMPLES}
