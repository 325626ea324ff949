"""What stands before the commands: version, help, wrong options without loading anything; and the doctor."""

import os
import subprocess
import sys
from pathlib import Path

import mminfer_kernels
import pytest
from mminfer_kernels import build
from typer.testing import CliRunner

import mminfer
from mminfer.cli.main import app

ROOT = Path(__file__).parents[2]
ENV = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]), "COLUMNS": "160"}

# The command line with arguments, where whatever takes long to load cannot be loaded.
LIGHT = """
import sys
class Heavy:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "transformers", "numpy", "PIL", "triton", "tqdm", "mminfer_kernels"}:
            raise AssertionError(f"{name} was loaded")
sys.meta_path.insert(0, Heavy())
from mminfer.cli.main import main
main()
"""


@pytest.fixture(autouse=True)
def _wide_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")


def invoke(*args):
    return CliRunner().invoke(app, args)


@pytest.mark.parametrize(
    ("args", "code", "told"),
    [
        (["--version"], 0, "mminfer 0.1.0"),
        (["--help"], 0, "generate"),
        (["generate", "--help"], 0, "--prefill-chunk-size"),
        (["bench", "--help"], 0, "needle"),
        (["bench", "needle", "--help"], 0, "--depths"),
        (["inspect", "--help"], 0, "index.html"),
        (["doctor", "--help"], 0, "--build"),
        (["--nope"], 2, "No such option: --nope"),
        (["generate", "--nope"], 2, "No such option: --nope"),
        (["generate", "--max-new-tokens", "x"], 2, "--max-new-tokens"),
        (["bench", "--batch", "0"], 2, "--batch"),
        (["bench", "needle", "--nope"], 2, "No such option: --nope"),
        (["nope"], 2, "No such command 'nope'"),
        (["bench", "nope"], 2, "No such command 'nope'"),
    ],
)
def test_nothing_heavy_is_loaded_for(args, code, told):
    process = subprocess.run([sys.executable, "-c", LIGHT, *args], env=ENV, capture_output=True, text=True, timeout=60)
    assert process.returncode == code, process.stderr
    assert told in (process.stderr if code else process.stdout) and "Traceback" not in process.stderr


def test_the_version_and_nothing_else():
    result = invoke("--version")
    assert result.exit_code == 0 and result.stdout == f"mminfer {mminfer.__version__}\n" and result.stderr == ""


def test_the_package_is_the_command_line():
    command = [sys.executable, "-m", "mminfer", "--version"]
    process = subprocess.run(command, env=ENV, capture_output=True, text=True, timeout=60)
    assert (process.returncode, process.stdout) == (0, f"mminfer {mminfer.__version__}\n"), process.stderr


def test_with_no_command_the_help_is_shown():
    assert invoke().output.strip() == invoke("--help").output.strip()


@pytest.fixture
def to_be_built(monkeypatch, tmp_path):
    """No library yet, and a folder for it; how often one was built."""
    built, library = [], build.library()

    def load(isa, on_progress):
        built.append(isa)
        return library or object()

    monkeypatch.setenv("MMINFER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(build, "_loaded", {})
    monkeypatch.setattr(build, "_check_buildable", lambda: None)
    monkeypatch.setattr(build, "_load", load)
    return built


def test_the_doctor_says_what_is_to_be_built_and_builds_nothing(to_be_built):
    result = invoke("doctor")
    assert result.exit_code == 0 and to_be_built == []
    told = " ".join(result.stdout.replace("│", " ").split())
    assert f"not built yet: C++ for {build.native_isa()}" in told and "'mminfer doctor --build'" in told
    rows = [line.split("│")[1:5] for line in result.stdout.splitlines() if line.count("│") == 5]
    cells = {row[0].strip(): [cell.strip() for cell in row[2:]] for row in rows if row[1].strip() == "cpu"}
    assert set(cells) == set(mminfer_kernels.OPS)
    assert cells["swiglu"] == ["native", f"C++ for {build.native_isa()}, not built yet"]
    assert cells["add_rows"] == ["reference", "torch's own is as fast"]


def test_the_doctor_builds_ahead(to_be_built):
    """Also a second time, when there is nothing left to do."""
    for done in ("built in ", "built before"):
        result = invoke("doctor", "--build")
        assert result.exit_code == 0, result.output
        assert result.stdout.startswith(f"native kernels: {done}") and str(build.cache_folder()) in result.stdout
        assert to_be_built == [build.native_isa()]
    assert "not built yet" not in invoke("doctor").stdout


def test_a_build_that_fails_ends_with_an_error(monkeypatch, tmp_path):
    monkeypatch.setenv("MMINFER_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", str(tmp_path / "missing"))
    monkeypatch.setattr(build, "_loaded", {})
    result = invoke("doctor", "--build")
    assert result.exit_code == 1 and result.stdout == ""
    assert "no native CPU kernels: no C++ compiler" in " ".join(result.stderr.split())


def test_an_instruction_set_that_cannot_be_is_refused(monkeypatch):
    monkeypatch.setenv("MMINFER_ISA", "avx3")
    for args in (["doctor"], ["doctor", "--build"], ["generate"]):
        result = invoke(*args)
        assert result.exit_code == 2 and "InputError: MMINFER_ISA is 'avx3'" in " ".join(result.stderr.split())


def on_console(redirections, *args, **env):
    """The command line in a shell; the console is whatever these redirections make of it."""
    command = " ".join([sys.executable, "-m", "mminfer", *args, redirections])
    return subprocess.run(command, shell=True, cwd=ROOT, env={**ENV, **env}, capture_output=True, timeout=120)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="redirections of Linux")
@pytest.mark.parametrize(
    ("redirections", "code", "told"),
    [
        ("> /dev/full", 2, b"standard output could not be written"),
        (">&-", 2, b"standard output is closed"),
        (">&- 2>&-", 2, b""),
        ("2> /dev/full", 0, b""),
    ],
)
def test_consoles_that_cannot_print(redirections, code, told):
    run = on_console(redirections, "--version")
    assert run.returncode == code and told in run.stderr
    assert b"Traceback" not in run.stderr and b"Exception ignored" not in run.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="redirections of Linux")
def test_errors_end_with_their_code_where_nobody_can_be_told():
    assert on_console("2> /dev/full", "bench", "--csv", "/nowhere/x").returncode == 2
    assert on_console("2>&-", "generate", "--nope").returncode == 2


def test_what_a_console_cannot_show_is_escaped():
    run = on_console("", "bench", "--csv", "/nowhere/caf\u00e9", PYTHONIOENCODING="ascii", PYTHONUTF8="1")
    assert run.returncode == 2 and rb"caf\xe9" in run.stderr
