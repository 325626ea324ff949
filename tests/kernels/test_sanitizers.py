"""The native kernels under AddressSanitizer and UBSan, over sound and hostile arguments, where the compiler can."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
from mminfer_kernels import build

from tests.kernels import hostile

pytestmark = pytest.mark.slow

SANITIZE = "-fsanitize=address,undefined -fno-sanitize-recover=undefined -g1"
EXAMPLES = 400


@pytest.fixture(scope="module")
def preloaded(tmp_path_factory):
    """The sanitizer's runtime, which must come before Python's own libraries."""
    if platform.system() != "Linux" or platform.libc_ver()[0] != "glibc":
        pytest.skip("the runtime is put before the others on Linux alone")
    compiler = build._compiler()[0]
    try:
        asked = [[compiler, f"-print-file-name={name}"] for name in ("libasan.so", "libstdc++.so.6")]
        found = [subprocess.run(x, capture_output=True, text=True, check=True).stdout.strip() for x in asked]
        source = tmp_path_factory.mktemp("sanitizers") / "empty.cpp"
        source.write_text("int main() { return 0; }")
        command = [compiler, *SANITIZE.split(), str(source), "-o", str(source.with_suffix(""))]
        subprocess.run(command, capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"the compiler has no sanitizers: {error}")
    if not all(Path(path).is_absolute() for path in found):
        pytest.skip(f"{compiler} has no runtime of AddressSanitizer to put first")
    return " ".join(found)  # with the one whose exceptions it watches


def test_no_call_leaves_its_memory(preloaded, tmp_path):
    log = tmp_path / "call"
    switches = {
        "LD_PRELOAD": preloaded,
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "CXX": f"{build._compiler()[0]} {SANITIZE}",
        "MMINFER_CACHE": str(tmp_path / "cache"),
        "MMINFER_ISA": "baseline",
        "MMINFER_NATIVE": "1",
        "OMP_NUM_THREADS": "2",
        "OMP_WAIT_POLICY": "passive",
    }
    command = [sys.executable, "-m", "tests.kernels.hostile", "--examples", str(EXAMPLES), "--log", str(log)]
    run = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | switches)
    called = log.read_text("utf-8") if log.exists() else "no call"
    assert run.returncode == 0, f"{called}\n{run.stdout[-1000:]}{run.stderr[:4000]}"
    assert f"of {len(hostile.OPS)} ops" in run.stdout and "runtime error" not in run.stderr
    assert any((tmp_path / "cache").glob("cpu-baseline-*.so"))
