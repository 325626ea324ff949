"""Who may import whom, read from the sources: the import order is the architecture."""

import ast
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
KERNELS = ROOT / "kernels"
ROOMS = ("tower", "positions", "tokens", "operators", "cache")
# From the ground up; wings of one floor know nothing of each other. What no floor names is found by a test.
ORDER = (
    ("errors",),
    ("layout", "cells"),
    ("technique",),
    ("models",),
    ("metrics",),
    ROOMS,
    ("settings_file",),
    ("config",),
    ("measured",),
    ("forward",),
    ("output", "nano"),
    ("inputs",),
    ("patching",),
    ("running",),
    ("streaming", "chat_files", "scheduling"),
    ("chat",),
    ("engine",),
    ("media", "serving"),
    ("needle", "inspection"),
    ("bench",),
    ("calibration",),
    ("cli",),
)
FLOORS = {wing: floor for floor, wings in enumerate(ORDER) for wing in wings}
SOURCES = sorted([*(ROOT / "mminfer").rglob("*.py"), *KERNELS.rglob("*.py")])


def wings():
    """Modules and folders of the package, by name."""
    found = (
        path.stem for path in (ROOT / "mminfer").iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()
    )
    return sorted(name for name in found if not name.startswith("__"))


class Import(NamedTuple):
    """One imported name: `from a import b` gives "a.b"."""

    name: str
    at_load: bool  # not inside a function
    for_types: bool  # inside `if TYPE_CHECKING:`

    def of(self, *packages: str) -> bool:
        return any(self.name == package or self.name.startswith(package + ".") for package in packages)


class Reader(ast.NodeVisitor):
    """Collects the imports of a module."""

    def __init__(self) -> None:
        self.found: list[Import] = []
        self._functions = self._types = 0

    def visit_Import(self, node: ast.Import) -> None:
        self.found += [Import(alias.name, not self._functions, bool(self._types)) for alias in node.names]

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        module = "." * node.level + (node.module or "")
        names = [f"{module}.{alias.name}" for alias in node.names]
        self.found += [Import(name, not self._functions, bool(self._types)) for name in names]

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        self._functions += 1
        self.generic_visit(node)
        self._functions -= 1

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_If(self, node: ast.If) -> None:
        for_types = ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
        self._types += for_types
        for child in node.body:
            self.visit(child)
        self._types -= for_types
        for child in node.orelse:
            self.visit(child)


def imports_in(text):
    reader = Reader()
    reader.visit(ast.parse(text))
    return reader.found


def imports_of(folder_or_file):
    """(file, import) pairs; those for type checkers alone left out."""
    path = ROOT / folder_or_file
    files = [path] if path.suffix else sorted(path.rglob("*.py"))
    assert files, f"no sources at {path}"
    return [(name, found) for name, found in pairs_of(files) if not found.for_types]


def pairs_of(files):
    return [(str(f.relative_to(ROOT)), found) for f in files for found in imports_in(f.read_text("utf-8"))]


def wrong(folder_or_file, *packages, allowed=()):
    """Imports from these packages, as "file: name"."""
    return [
        f"{file}: {found.name}"
        for file, found in imports_of(folder_or_file)
        if found.of(*packages) and not (allowed and found.of(*allowed))
    ]


def test_the_reader_sees_what_it_should():
    found = imports_in(
        "import a.b\nfrom c import d\nfrom . import e\nif TYPE_CHECKING:\n    import f\nelse:\n    import g\n"
        "def h():\n    import i\nclass J:\n    import k\ntry:\n    import l\nexcept ImportError:\n    pass\n"
    )
    assert [x.name for x in found if x.at_load and not x.for_types] == ["a.b", "c.d", "..e", "g", "k", "l"]
    assert [x.name for x in found if x.for_types] == ["f"]
    assert [x.name for x in found if not x.at_load] == ["i"]
    assert Import("a.b", True, False).of("a") and not Import("ab", True, False).of("a")


def test_imports_are_absolute():
    assert [(file, found) for file, found in pairs_of(SOURCES) if found.name.startswith(".")] == []


def test_kernels_know_nothing_of_the_engine():
    assert wrong("kernels/mminfer_kernels", "mminfer") == []
    assert wrong("kernels/mminfer_kernels", "transformers") == []


@pytest.mark.parametrize("wing", wings())
def test_wings_are_built_from_the_ground_up(wing):
    """Nobody imports what stands above, and every wing has its place in the order."""
    above = [f"mminfer.{other}" for other in FLOORS if FLOORS[other] > FLOORS[wing]]
    apart = [f"mminfer.{other}" for other in FLOORS if FLOORS[other] == FLOORS[wing] and other != wing]
    sources = f"mminfer/{wing}" if (ROOT / "mminfer" / wing).is_dir() else f"mminfer/{wing}.py"
    assert wrong(sources, *above, *apart) == []


def test_the_order_names_every_wing_and_nothing_else():
    assert sorted(FLOORS) == sorted(wings())


@pytest.mark.parametrize("wing", wings())
def test_annotations_run_no_farther_up_than_imports(wing):
    """Names for type checkers may come from the models and from a wing's own floor, but from nothing above."""
    above = [f"mminfer.{other}" for other in FLOORS if FLOORS[other] > max(FLOORS[wing], FLOORS["models"])]
    path = ROOT / "mminfer" / wing
    files = sorted(path.rglob("*.py")) if path.is_dir() else [path.with_suffix(".py")]
    assert [f"{file}: {found.name}" for file, found in pairs_of(files) if found.of(*above)] == []


@pytest.mark.parametrize("wing", ["forward", "patching", "running", "scheduling", "inputs", "engine", "chat"])
def test_the_passes_know_techniques_by_their_interface_alone(wing):
    """They reach the rooms through the configuration: none of them names a technique."""
    sources = f"mminfer/{wing}" if (ROOT / "mminfer" / wing).is_dir() else f"mminfer/{wing}.py"
    assert wrong(sources, *(f"mminfer.{room}" for room in ROOMS)) == []


@pytest.mark.parametrize("room", ROOMS)
def test_technique_rooms_know_their_interface_and_nothing_else(room):
    """Neither families nor each other, nor who runs them."""
    shared = [f"mminfer.{name}" for name in (room, "technique", "layout", "errors")]
    assert wrong(f"mminfer/{room}", "mminfer", allowed=shared) == []


def test_the_interface_of_techniques_knows_none():
    assert (
        wrong(
            "mminfer/technique", "mminfer", allowed=[f"mminfer.{x}" for x in ("technique", "errors", "layout", "cells")]
        )
        == []
    )
    assert wrong("mminfer/layout", "mminfer", allowed=["mminfer.errors", "mminfer.layout"]) == []
    assert wrong("mminfer/errors.py", "mminfer") == []


def test_families_know_no_technique():
    assert wrong("mminfer/models", "mminfer.technique", *(f"mminfer.{room}" for room in ROOMS)) == []


def test_training_stays_outside():
    assert wrong("mminfer", "training", "benchmarks", "tests") == []


def test_optional_packages_are_imported_where_they_are_used():
    """Only files of Triton kernels and their compiler need triton to load; nobody else loads those while loading."""
    early = [(file, found) for file, found in pairs_of(SOURCES) if found.at_load]
    assert [f"{file}: {x.name}" for file, x in early if x.of("flash_attn")] == []
    gpu = [f"{file}: {x.name}" for file, x in early if x.of("triton")]
    assert [found for found in gpu if "triton_kernel.py:" not in found and "/aot.py:" not in found] == []
    loads = [f"{file}: {x.name}" for file, x in early if {"triton_kernel", "aot"} & set(x.name.split("."))]
    assert [found for found in loads if "triton_kernel.py:" not in found] == []


def test_kernels_is_a_folder_and_no_package():
    assert not (KERNELS / "__init__.py").exists()
    assert (KERNELS / "mminfer_kernels" / "__init__.py").exists()


def names_in(text):
    """Every name that a module imports or reads as an attribute; keywords and keys with constant values."""
    for found in imports_in(text):
        yield found.name
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Attribute):
            yield ast.unparse(node)
        elif isinstance(node, ast.keyword) and isinstance(node.value, ast.Constant):
            yield f"{node.arg}={node.value.value}"
        elif isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if isinstance(key, ast.Constant) and isinstance(value, ast.Constant):
                    yield f"{key.value}={value.value}"


def unsafe(text):
    """What would run code out of a file or from the hub."""
    modules = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
    names = ("torch.load", "torch.hub", "weights_only=False", "allow_pickle=True", "trust_remote_code=True")
    return [name for name in names_in(text) if name.startswith(names) or name.split(".")[0] in modules]


def test_unsafe_loading_is_seen():
    assert unsafe("import pickle") and unsafe("from torch import load\nx = torch.load('f')")
    assert unsafe("f(trust_remote_code=True)") and unsafe("f(**{'trust_remote_code': True})")
    assert not unsafe("f(trust_remote_code=given)\n'torch.load'")


def test_no_source_runs_code_out_of_a_file():
    assert {str(p): found for p in SOURCES if (found := unsafe(p.read_text("utf-8")))} == {}


def test_sources_are_there():
    assert len(SOURCES) > 40


@pytest.mark.slow
def test_importing_changes_nothing_and_needs_no_optional_package():
    """In a process of its own: the host's attention functions stay, and nothing optional has to be there."""
    program = """
import sys
optional = "triton flash_attn av matplotlib sklearn fastapi uvicorn llguidance prometheus_client"
sys.modules |= dict.fromkeys(optional.split())
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
before = dict(ALL_ATTENTION_FUNCTIONS.items())
import mminfer, mminfer.cli.main, mminfer.media
assert dict(ALL_ATTENTION_FUNCTIONS.items()) == before, "attention functions changed"
print("fine")
"""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(KERNELS)])}
    command = [sys.executable, "-c", program]
    process = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert process.stdout == "fine\n", process.stderr
