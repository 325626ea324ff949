"""Ops as torch.library sees them: schemas, fakes, compilation in one graph, FLOPs by the registered formulas."""

import mminfer_kernels
import pytest
import torch
from mminfer_kernels import (
    add_rows,
    apply_rotary,
    best_match,
    column_mass,
    decode_attention,
    fit_masses,
    gather_rms_norm,
    gather_rows,
    grow_regions,
    k_centres,
    merge_rows,
    packed_decode_attention,
    packed_prompt_attention,
    power_iterate,
    prompt_attention,
    prompt_attention_mass,
    prompt_attention_peak,
    replay_attention,
    rotary,
    rotary_,
    rotary_table,
    row_dots,
    swiglu,
    top_places,
    tracing,
)
from mminfer_kernels.replay_attention import rows_of_entries
from torch.utils.flop_counter import FlopCounterMode

pytestmark = pytest.mark.usefixtures("backend")

BATCH, HEADS, GROUPS, QUERIES, TOKENS, SIZE = 2, 6, 2, 9, 20, 8
FIRST_AND_LENGTHS = torch.tensor([[0, 3], [9, 0]]), torch.tensor([[20, 1], [7, 12]])
PAIRS = sum(range(TOKENS - QUERIES + 1, TOKENS + 1))  # of one head


def inputs_of(name):
    """Positional arguments of each op."""
    q = torch.randn(BATCH, HEADS, QUERIES, SIZE)
    k, v = torch.randn(BATCH, GROUPS, TOKENS, SIZE), torch.randn(BATCH, GROUPS, TOKENS, SIZE)
    x, rows, index = torch.randn(BATCH, 7, SIZE), torch.randn(BATCH, 4, SIZE), torch.randint(7, (BATCH, 4))
    position, inv_freq = torch.rand(BATCH, TOKENS).double(), torch.rand(SIZE // 2)
    own, groups = torch.randn(2, BATCH, GROUPS, QUERIES, SIZE), torch.tensor([[0, QUERIES, 2, 7]], dtype=torch.int32)
    turned = torch.randn(BATCH, HEADS, TOKENS, SIZE)
    return {
        "prompt_attention": (q, k, v),
        "prompt_attention_mass": (q, k, v),
        "prompt_attention_peak": (q, k, v, 0.3, None, 15, torch.rand(BATCH, GROUPS, TOKENS)),
        "replay_attention": (q, *own, k, v, groups, rows_of_entries(groups, TOKENS), QUERIES),
        "fit_masses": (torch.rand(3, 5, 4), torch.tensor([5, 4, 1]), 0.3, 4, 20.0),
        "top_places": (torch.rand(2, 9), 4, torch.rand(2, 9) < 0.5),
        "column_mass": (q, k),
        "power_iterate": (q, k, 3),
        "decode_attention": (q, k, v, torch.tensor([0, 5])),
        "packed_prompt_attention": (q[:1], k[0, 0], v[0, 0], torch.tensor([0, 5]), torch.tensor([9, 12])),
        "packed_decode_attention": (q[:, :, :1], k[0, 0], v[0, 0], *FIRST_AND_LENGTHS),
        "best_match": (rows, x),
        "k_centres": (-(x[..., :1] - x[..., :1].mT).abs(), torch.tensor([2, 3]), 4),
        "merge_rows": (x, rows, index),
        "_add_rows_": (x, index, rows, "auto"),
        "gather_rows": (x, index),
        "gather_rms_norm": (x, index, x[0, 0]),
        "row_dots": (x[0], index[0], index[1]),
        "grow_regions": (x[0], torch.rand(7) + 1, torch.stack([torch.arange(6), torch.arange(1, 7)]), 0.0, 3),
        "swiglu": (x, x.flip(1)),
        "rotary": (turned, k, position, inv_freq),
        "rotary_": (turned, k, position, inv_freq),
        "rotary_table": (position, inv_freq),
        "apply_rotary": (turned, k, torch.rand(BATCH, TOKENS, SIZE), torch.rand(BATCH, TOKENS, SIZE)),
    }[name]


NAMES = [
    "prompt_attention", "prompt_attention_mass", "prompt_attention_peak", "column_mass", "power_iterate",
    "packed_prompt_attention", "decode_attention", "packed_decode_attention", "best_match", "k_centres", "merge_rows",
    "_add_rows_", "gather_rows", "gather_rms_norm", "row_dots", "grow_regions", "swiglu", "rotary", "rotary_",
    "rotary_table", "apply_rotary", "replay_attention", "fit_masses", "top_places",
]  # fmt: skip


def test_every_op_is_here():
    assert {op for op in torch._C._dispatch_get_all_op_names() if op.startswith("mminfer::")} == {
        f"mminfer::{name}" for name in NAMES
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_schema_and_fake(name, dtype):
    """The schema says what is written to, no output shares memory with an input, and the fake gives the same sizes,
    strides and dtypes."""
    inputs = tuple(
        x.to(dtype) if isinstance(x, torch.Tensor) and x.dtype == torch.float32 else x for x in inputs_of(name)
    )
    op = getattr(torch.ops.mminfer, name).default
    torch.library.opcheck(op, inputs, test_utils=("test_schema", "test_faketensor"))


CALLS = {
    "prompt_attention": lambda q, k, v: prompt_attention(q, k, v, window=4),
    "prompt_attention_mass": prompt_attention_mass,
    "prompt_attention_peak": prompt_attention_peak,
    "replay_attention": replay_attention,
    "fit_masses": fit_masses,
    "top_places": top_places,
    "column_mass": lambda q, k: column_mass(q, k, temperature=0.5),
    "power_iterate": power_iterate,
    "decode_attention": decode_attention,
    "packed_prompt_attention": packed_prompt_attention,
    "packed_decode_attention": packed_decode_attention,
    "best_match": best_match,
    "k_centres": lambda similarity, counts, most: k_centres(similarity, counts, most),
    "merge_rows": merge_rows,
    "_add_rows_": lambda x, index, rows, backend: add_rows(x, index, rows, backend=backend),
    "gather_rows": gather_rows,
    "gather_rms_norm": gather_rms_norm,
    "row_dots": row_dots,
    "grow_regions": grow_regions,
    "swiglu": swiglu,
    "rotary": rotary,
    "rotary_table": lambda position, inv_freq: rotary_table(position, inv_freq, 0.5, dtype=torch.bfloat16),
    "apply_rotary": apply_rotary,
}


@pytest.mark.parametrize("name", CALLS)
def test_compile_sees_through(name):
    inputs, call = inputs_of(name), CALLS[name]
    wanted = call(*inputs)
    graphs = []

    def keep(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    found = torch.compile(call, backend=keep, fullgraph=True)(*inputs)
    for ours, theirs in zip(*((x,) if isinstance(x, torch.Tensor) else x for x in (found, wanted)), strict=True):
        assert torch.equal(ours, theirs) and ours.stride() == theirs.stride()
    assert f"mminfer.{name}" in graphs[0].code


def test_in_place_ops_compile():
    inputs = inputs_of("rotary_")
    wanted = rotary(*inputs)
    torch._dynamo.reset()
    torch.compile(rotary_, backend="eager", fullgraph=True)(*inputs)
    assert all(torch.equal(x, y) for x, y in zip(inputs, wanted, strict=False))


def counted(name, *extra):
    with FlopCounterMode(display=False) as counter:
        CALLS.get(name, getattr(mminfer_kernels, name))(*inputs_of(name), *extra)
    return counter.get_flop_counts()["Global"], counter.get_total_flops()


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("prompt_attention", BATCH * HEADS * QUERIES * 4 * 4 * SIZE),  # each query sees the 4 keys of its window
        ("column_mass", BATCH * HEADS * PAIRS * 2 * (SIZE + 1)),
        ("power_iterate", BATCH * HEADS * PAIRS * 2 * (SIZE + 3)),
        ("decode_attention", HEADS * (BATCH * PAIRS - QUERIES * 5) * 4 * SIZE),  # one row starts at its sixth entry
        ("packed_prompt_attention", HEADS // GROUPS * (9 * 10 // 2 + 9 * (4 + 12) // 2) * 4 * SIZE),
        ("packed_decode_attention", HEADS // GROUPS * (20 + 1 + 7 + 12) * 4 * SIZE),
        ("best_match", BATCH * 4 * 7 * 2 * SIZE),
    ],
)
def test_flops_by_the_formula(name, wanted):
    by_op, total = counted(name)
    assert total == wanted
    assert list(by_op) == [getattr(torch.ops.mminfer, name)]


def test_flops_of_scores_shared_or_not(backend):
    products = 2 if backend == "native" else 3
    assert counted("prompt_attention_mass")[1] == BATCH * HEADS * PAIRS * 2 * (products * SIZE + 1)
    again = 0 if backend == "native" else sum(min(n, 15) for n in range(TOKENS - QUERIES + 1, TOKENS + 1))
    assert counted("prompt_attention_peak")[1] == BATCH * HEADS * 2 * SIZE * (2 * PAIRS + again)


def test_flops_of_packed_sequences():
    q, k = torch.randn(1, 4, 10, SIZE), torch.randn(1, 2, 10, SIZE)
    with FlopCounterMode(display=False) as counter:
        column_mass(q, k, cu_seqlens=torch.tensor([0, 4, 10]))
    assert counter.get_total_flops() == 4 * (10 + 21) * 2 * (SIZE + 1)


def test_a_plain_call_does_not_go_through_the_dispatcher():
    assert not tracing.watched()
    with FlopCounterMode(display=False):
        assert tracing.watched()
    assert not tracing.watched()
