"""No op ever holds anything near an N x N matrix."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mminfer_kernels.best_match import reference as best_match
from mminfer_kernels.column_mass import reference as column_mass
from mminfer_kernels.prompt_attention import reference as prompt_attention
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

TOKENS, HEADS = 2000, 2
BLOCK = 128 * HEADS * TOKENS  # 128 rows a head: 1/15 of the whole
KERNELS = Path(__file__).parents[2] / "kernels"


class LargestTensor(TorchDispatchMode):
    """Records the largest tensor any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = (leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor))
        self.elements = max(self.elements, *sizes, 0)
        return out


def attention(function, *settings, queries=TOKENS, values=False):
    q, k = torch.randn(1, HEADS, queries, 16), torch.randn(1, 1, TOKENS, 16)
    function(q, k, *([k] if values else []), *settings)


# The references themselves: a dispatch mode sees a public op as one call.
THIRD = torch.arange(0, TOKENS, 3)
CALLS = {
    "column_mass": lambda: attention(column_mass.column_mass, None, 0.25, True, None),
    "column_mass of every third query": lambda: attention(
        column_mass.column_mass, None, 0.25, True, THIRD, queries=len(THIRD)
    ),
    "column_mass not causal": lambda: attention(column_mass.column_mass, None, 0.25, False, None),
    "power_iterate": lambda: attention(column_mass.power_iterate, 5, 2.5, None),
    "best_match": lambda: best_match.best_match(torch.randn(HEADS, TOKENS, 16), torch.randn(HEADS, TOKENS, 16)),
    "prompt_attention": lambda: attention(prompt_attention.prompt_attention, 0.25, None, None, values=True),
    "prompt_attention by a window": lambda: attention(prompt_attention.prompt_attention, 0.25, None, 99, values=True),
    "prompt_attention of keys that stand for several": lambda: attention(
        prompt_attention.prompt_attention, 0.25, None, None, torch.zeros(1, 1, TOKENS), values=True
    ),
    "prompt_attention_mass": lambda: attention(prompt_attention.prompt_attention_mass, None, 0.25, None, values=True),
    "prompt_attention_peak": lambda: attention(prompt_attention.prompt_attention_peak, 0.25, None, TOKENS, values=True),
}
FUSED = {"prompt_attention"}  # one call of SDPA, nothing to see inside


@pytest.mark.parametrize("name", CALLS)
def test_scratch_of_the_references_stays_far_below_n_squared(name):
    with LargestTensor() as largest:
        CALLS[name]()
    inputs = HEADS * TOKENS * 16
    assert largest.elements >= inputs
    assert largest.elements > inputs or name in FUSED  # its blocks were seen
    assert largest.elements <= BLOCK


NATIVE = """
import json, torch, mminfer_kernels
from pathlib import Path
torch.set_num_threads(2)

def resident(what):
    return next(int(x.split()[1]) for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(what))

def extra_mebibytes(call):
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = resident("VmHWM")
    call()
    return (resident("VmHWM") - before) / 1024

def run(tokens):
    q, k, v = torch.randn(1, 14, tokens, 64), torch.randn(1, 2, tokens, 64), torch.randn(1, 2, tokens, 64)
    rows, index = torch.randn(tokens, 64), torch.zeros(tokens).long()
    calls = {
        "column_mass": lambda: mminfer_kernels.column_mass(q, k, backend="native"),
        "prompt_attention_mass": lambda: mminfer_kernels.prompt_attention_mass(q, k, v, backend="native"),
        "prompt_attention_peak": lambda: mminfer_kernels.prompt_attention_peak(q, k, v, backend="native"),
        "power_iterate": lambda: mminfer_kernels.power_iterate(q, k, backend="native"),
        "best_match": lambda: mminfer_kernels.best_match(rows, rows, backend="native"),
        "merge_rows": lambda: mminfer_kernels.merge_rows(rows, rows, index, backend="native"),
        "dense": lambda: (q @ k.repeat_interleave(7, 1).mT)[0, 0, 0, 0],
    }
    return {name: extra_mebibytes(call) for name, call in calls.items()}

run(64)  # libraries are loaded, threads started
print(json.dumps(run(4096)))
"""


@pytest.fixture(scope="module")
def mebibytes(native):
    """By how much the peak memory of a process grows while it runs each op at 4,096 tokens, 14/2 heads of 64."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("peak memory cannot be reset here")
    kept = dict.fromkeys(("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"), "131072")  # what is freed is gone
    env = {**os.environ, "PYTHONPATH": str(KERNELS), **kept}
    run = subprocess.run(
        [sys.executable, "-c", NATIVE], env=env, capture_output=True, text=True, timeout=300, check=False
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.mark.slow
def test_memory_is_measured(mebibytes):
    assert mebibytes["dense"] > 850


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["column_mass", "prompt_attention_mass", "prompt_attention_peak", "power_iterate", "best_match", "merge_rows"],
)
def test_native_kernels_take_little_memory(mebibytes, name):
    """The whole attention matrix would be 896 MiB, one head of it 64."""
    assert 0 < mebibytes[name] <= 64
