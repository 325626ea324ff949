"""`import mminfer` is light: names and modules arrive when they are asked for, and are what type checkers are told."""

import ast
import copy
import os
import pickle
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import mminfer

ROOT = Path(__file__).parents[1]
MODULES = sorted(
    path.stem
    for path in (ROOT / "mminfer").iterdir()
    if not path.name.startswith("_") and (path.suffix == ".py" or (path / "__init__.py").is_file())
)
TABLE = vars(mminfer)["_MODULE_OF"]


def in_a_process(program, *arguments):
    """What a program prints in a process of its own."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    command = [sys.executable, "-c", program, *arguments]
    process = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr
    return process.stdout


def test_importing_loads_nothing_heavy():
    """Nor do listing the names, the errors, and the version."""
    program = """
import sys
import mminfer
dir(mminfer), mminfer.__version__, mminfer.InputError, mminfer.errors, hasattr(mminfer, "nothing")
print(sorted({"torch", "transformers", "triton", "numpy", "PIL", "mminfer_kernels", "mminfer.engine"} & {*sys.modules}))
import mminfer.cli.main
print(sorted({"torch", "transformers", "triton", "numpy", "PIL", "mminfer_kernels", "mminfer.engine"} & {*sys.modules}))
"""
    assert in_a_process(program) == "[]\n[]\n"


def test_every_name_is_what_its_module_has():
    assert sorted(TABLE) == sorted(mminfer.__all__)
    for name, module in TABLE.items():
        assert getattr(mminfer, name) is getattr(import_module(module), name)


def test_type_checkers_are_told_the_same_names():
    tree = ast.parse((ROOT / "mminfer" / "__init__.py").read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    told = {alias.name: node.module for node in block.body for alias in node.names}
    modules = {name for name, module in told.items() if module == "mminfer"}
    assert {name: module for name, module in told.items() if module != "mminfer"} == TABLE
    assert modules <= set(MODULES) and {"cache", "nano", "positions", "tokens"} <= modules


def test_everything_is_listed_once():
    names = dir(mminfer)
    assert {*mminfer.__all__, *MODULES, "__version__"} <= set(names)
    assert len(names) == len(set(names)) and "__main__" not in names


@pytest.mark.parametrize("asked", [MODULES, MODULES[::-1]])
@pytest.mark.slow
def test_modules_arrive_by_their_names(asked):
    program = "import sys, mminfer\nfor name in sys.argv[1:]: print(getattr(mminfer, name).__name__)"
    assert in_a_process(program, *asked).split() == [f"mminfer.{name}" for name in asked]


@pytest.mark.parametrize("name", ["Engin", "nothing", "__main__", "_private", "a.b", ""])
def test_unknown_names_raise_as_usual(name):
    with pytest.raises(AttributeError, match=f"^module 'mminfer' has no attribute '{name}'$"):
        getattr(mminfer, name)


@pytest.mark.slow
def test_other_ways_in():
    with pytest.raises(ImportError, match="cannot import name 'nothing' from 'mminfer'"):
        from mminfer import nothing  # noqa: F401
    program = "from mminfer import *\nprint(sorted(n for n in dir() if not n.startswith('_')))"
    assert in_a_process(program) == f"{sorted(mminfer.__all__)}\n"


@pytest.mark.slow
def test_settings_are_pickled_and_copied():
    config = mminfer.InferenceConfig(mminfer.V2PE(1 / 16), cache=mminfer.LookM(budget=100))
    assert copy.deepcopy(config) == config
    program = "import pickle, sys\nprint(pickle.loads(bytes.fromhex(sys.argv[1])))"
    assert in_a_process(program, pickle.dumps(config).hex()) == f"{config}\n"
    assert pickle.loads(pickle.dumps(mminfer.Engine)) is mminfer.Engine


@pytest.mark.slow
def test_without_the_modules_of_posix_everything_loads_and_runs():
    """As for our modules on Windows: every module of both packages, and an answer with its peak memory."""
    program = """
import builtins
posix, load = {"resource", "fcntl", "pwd", "grp", "termios", "pty", "tty", "syslog"}, builtins.__import__
def without(name, globals=None, *args, **kwargs):
    if name in posix and (globals or {}).get("__name__", "").startswith("mminfer"):
        raise ModuleNotFoundError(name)
    return load(name, globals, *args, **kwargs)
builtins.__import__ = without
from importlib import import_module
from pkgutil import walk_packages
import mminfer, mminfer_kernels
for package in (mminfer, mminfer_kernels):
    for module in walk_packages(package.__path__, f"{package.__name__}."):
        if not module.name.endswith(("triton_kernel", "aot")):
            import_module(module.name)
from mminfer.metrics import memory
memory._of_status = lambda name: 0  # there is no /proc either
print(mminfer.Engine.from_pretrained().generate(mminfer.nano.sample_messages(), max_new_tokens=1).stats.peak_bytes)
"""
    assert int(in_a_process(program)) > 2**27
