"""README and docs do what they say: every block runs, every named command exists, every link leads somewhere."""

import json
import os
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from mminfer.config import PRESETS
from mminfer.nano import samples_path
from tests import pages
from tests.pages import INERT, LANGUAGES, PAGES, ROOT, Block, blocks, blocks_of, read
from tests.preloaded import python
from tests.test_architecture import wings

README_BYTES = 12_288
FRONT_DOOR = ("first command", "test command")
PICTURES = {"page-1.png": "ZB.png", "page-2.png": "NJ.png", "a.png": "WB.png", "b.png": "GL.png"}
CONSOLE = "import sys; sys.argv[0] = 'mminfer'; from mminfer.cli.main import main; main()"
# Help of commands, all in one process: importing torch once for each would take minutes.
ASKING = """
import contextlib, io, json, runpy, sys, traceback
found = {}
for target in json.loads(sys.stdin.read()):
    out = io.StringIO()
    sys.argv = [*target, "--help"]
    try:
        with contextlib.redirect_stdout(out):
            if target[0] == "mminfer":
                from mminfer.cli.main import main
                main()
            else:
                runpy.run_module(target[0], run_name="__main__", alter_sys=False)
    except SystemExit:
        pass
    except BaseException:
        out.write(traceback.format_exc())
    found[" ".join(target)] = out.getvalue()
print(json.dumps(found))
"""


@pytest.fixture
def folder(tmp_path):
    """Where a reader might stand: with pictures, pages and videos of the names that the docs use."""
    here = tmp_path / "here"
    (here / "pages").mkdir(parents=True)
    for name, sample in PICTURES.items():
        shutil.copy(samples_path() / sample, here / name)
    for name in ("page-1.png", "page-2.png"):
        shutil.copy(here / name, here / "pages" / name)
    for name in ("clip.mp4", "lecture.mp4"):
        shutil.copy(samples_path() / "clip.mp4", here / name)
    shutil.copy(ROOT / "examples" / "add_a_technique.py", here)
    return here


def run(command, folder, stdin=None, starts=None):
    """A command that finds `mminfer` and `python` of this tree, as an activated environment would have them.

    Args:
        command: its words.
        folder: where it runs.
        stdin: what it reads.
        starts: the words that start Python; None: forked, which a signal from the command would not reach.
    """
    programs = folder.parent / "bin"
    if not programs.exists():
        programs.mkdir()
        for name, arguments in (("mminfer", ["-c", CONSOLE]), ("python", [])):
            words = " ".join(f'"{word}"' for word in (*(starts or python()), *arguments))
            (programs / name).write_text(f'#!/bin/sh\nexec {words} "$@"\n')
            (programs / name).chmod(0o755)
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {
        "PATH": os.pathsep.join([str(programs), os.environ["PATH"]]),
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]),
        "COLUMNS": "200",
        "TERM": "dumb",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(command, cwd=folder, env=env, input=stdin, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def run_python(found, folder):
    """Blocks of one page in order, in one namespace; tracebacks count lines as the page does."""
    lines: list[str] = []
    for block in found:
        lines += [""] * (block.line - 1 - len(lines)) + block.text.splitlines()
    script = folder.parent / "scripts" / f"{found[0].page.replace('/', '_')}.py"
    script.parent.mkdir(exist_ok=True)
    script.write_text("\n".join(lines) + "\n")
    return run([*python(), str(script)], folder)


def run_shell(text, folder):
    return run(["bash", "-euo", "pipefail", "-c", text], folder, starts=[sys.executable] if "kill" in text else None)


@pytest.mark.slow
@pytest.mark.parametrize("page", dict.fromkeys(block.page for block in blocks("python")))
def test_python_blocks_run(page, folder):
    run_python([block for block in blocks("python") if block.page == page], folder)


@pytest.mark.slow
@pytest.mark.parametrize("block", [b for b in blocks("shell") if b.mark not in FRONT_DOOR], ids=lambda b: b.name)
def test_shell_blocks_run(block, folder):
    run_shell(block.text, folder)


def test_blocks_that_do_not_run_are_seen(folder):
    text = "```python\nx = 1\n```\n\n- so:\n  ```py\n  assert x == 2\n  ```\n~~~sh\nfalse\ntrue\n~~~\n"
    first, second, third = blocks_of("page.md", text)
    assert (first.line, second.line, third.line) == (2, 7, 10) and second.text == "assert x == 2\n"
    assert [LANGUAGES[block.language] for block in (first, second, third)] == ["python", "python", "shell"]
    run_python([first], folder)
    with pytest.raises(AssertionError, match=r"page\.md\.py\", line 7"):
        run_python([first, second], folder)
    with pytest.raises(AssertionError):
        run_shell(third.text, folder)
    with pytest.raises(ValueError, match="never closed"):
        blocks_of("page.md", "```python\n")


@pytest.mark.parametrize("page", PAGES)
def test_fences_say_what_they_hold(page):
    """So that no block escapes being run."""
    known = {*LANGUAGES, *INERT}
    assert [b.name for b in blocks_of(page, read(page)) if b.language not in known] == []


def front_door(mark):
    (block,) = [block for block in blocks("shell") if block.mark == mark]
    assert block.page == "README.md"
    return block.text.strip().split(" && ")


def test_the_front_door_has_two_commands():
    assert sorted(block.mark for block in blocks("shell") if block.mark) == sorted(FRONT_DOOR)
    assert [b.name for b in blocks("shell") if "pip install" in b.text and b.mark not in FRONT_DOOR] == []


@pytest.mark.slow
def test_the_first_command_answers(folder):
    """All but the installing, which the test command does likewise."""
    make, install, *then = front_door("first command")
    assert make == "python3 -m venv .venv" and install == ".venv/bin/pip install -q ."
    assert then == [".venv/bin/mminfer generate"]
    run("true", folder)
    (folder / ".venv").mkdir()
    (folder / ".venv/bin").symlink_to(folder.parent / "bin")
    assert "WB" in run_shell(then[0], folder)


def test_ci_runs_the_test_command(tmp_path):
    """CI takes the command out of the README; here everything but the printing is cut off."""
    make, install, *then = front_door("test command")
    assert make == "python3 -m venv .venv" and install == '.venv/bin/pip install -q -e ".[test]"'
    assert then == [".venv/bin/python -m pytest -n auto --dist worksteal"]
    script = (ROOT / ".ci/run").read_text().replace('eval "$command"', "")
    (tmp_path / ".ci").mkdir()
    (tmp_path / ".ci/run").write_text(script)
    (tmp_path / "README.md").write_text(read("README.md"))
    out = subprocess.run(["bash", ".ci/run"], cwd=tmp_path, capture_output=True, text=True, check=True, env=os.environ)
    assert out.stdout.strip() == " && ".join([make, install, *then])


def test_the_first_example_answers():
    """The first lines of the README, as they stand."""
    scope: dict = {}
    exec(next(block for block in blocks("python") if block.page == "README.md").text, scope)
    assert scope["out"].text == "WB"


def target_of(words):
    """What to ask for help: the module, or mminfer and its subcommands."""
    if words[0] == "python":
        return (words[2],)
    return tuple(word for n, word in enumerate(words) if not any(w.startswith("-") for w in words[: n + 1]))


LISTED = list(dict.fromkeys(words for words in pages.commands() if words[:3] != ("python", "-m", "pytest")))


@pytest.fixture(scope="module")
def helps(tmp_path_factory):
    """What each listed command answers to --help."""
    folder = tmp_path_factory.mktemp("asking") / "here"
    folder.mkdir()
    targets = sorted({target_of(words) for words in LISTED})
    return json.loads(run([*python(), "-c", ASKING], folder, json.dumps(targets)).splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("words", LISTED, ids=" ".join)
def test_listed_commands_exist(words, helps):
    """They take too long to run: the command is there, and so are its options and presets."""
    told = helps[" ".join(target_of(words))]
    assert "usage" in told.lower(), told
    known = set(told.replace(",", " ").replace("[", " ").replace("]", " ").split())
    assert [word for word in words if word.startswith("--") and word not in known] == []
    named = [value for option, value in pairwise(words) if option == "--preset"]
    assert set(named) <= set(PRESETS)


def test_commands_are_found_in_tables():
    assert len(LISTED) > 30
    assert target_of(["mminfer", "bench", "needle", "--images", "4", "--preset", "off"]) == (
        "mminfer",
        "bench",
        "needle",
    )
    assert target_of(("python", "-m", "benchmarks.docs")) == ("benchmarks.docs",)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    text = pages.prose(read(page))
    for link in pages.LINK.findall(text):
        if "://" in link:
            continue
        file, _, anchor = link.partition("#")
        there = (ROOT / page).parent / file if file else ROOT / page
        assert there.exists(), f"{page}: {link}"
        assert not anchor or anchor in pages.anchors(there.read_text(encoding="utf-8")), f"{page}: {link}"


def test_the_readme_is_short():
    assert len(read("README.md").encode()) <= README_BYTES


def test_design_names_every_wing():
    rows = [line.split("|")[1] for line in read("docs/design.md").splitlines() if line.startswith("| `")]
    assert [wing for wing in wings() if not any(f"`{wing}`" in row for row in rows)] == []


def test_the_licence_is_whole():
    text = read("LICENSE")
    assert text.lstrip().startswith("Apache License") and "END OF TERMS AND CONDITIONS" in text
    assert all(f"\n   {n}. " in text for n in range(1, 10))


def test_pages_are_found():
    assert {"README.md", "docs/using.md", "docs/design.md"} <= set(PAGES)
    assert all(isinstance(block, Block) for block in blocks("python")) and len(blocks("python")) > 10
    assert Path(ROOT / "README.md").is_file()
