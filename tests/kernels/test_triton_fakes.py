"""What the fakes promise torch.compile is what the Triton backend returns: shape, dtype, strides; nothing aliases."""

import pytest
import torch
from mminfer_kernels import rotary_table
from mminfer_kernels.replay_attention import rows_of_entries

INV_FREQ = 1 / 1e4 ** (torch.arange(8) / 8)
POSITION = torch.rand(2, 9, dtype=torch.float64)


def heads(count, tokens=9, layout="dense"):
    if layout == "by tokens":
        return torch.randn(2, tokens, count, 16).transpose(1, 2)
    return torch.randn(2, count, 16, tokens).mT if layout == "by columns" else torch.randn(2, count, tokens, 16)


def calls(layout):
    q, k = heads(4, 9, layout), heads(2, 9, layout)
    cos, sin = rotary_table(POSITION, INV_FREQ)
    groups = torch.tensor([[0, k.shape[2], 2, 7]], dtype=torch.int32)
    rows, index = q[:, 0], torch.tensor([[1, 3], [0, 0]])
    return {
        "apply_rotary": (q, k, cos, sin),
        "best_match": (rows, k[:, 0]),
        "column_mass": (q, k),
        "decode_attention": (q[:, :, :2], k, k),
        "packed_prompt_attention": (q[:1], *k[:2, 0], torch.tensor([0, 0]), torch.tensor([9, 9])),
        "packed_decode_attention": (
            q[:, :, :1],
            k[0, 0],
            k[0, 1],
            torch.tensor([[0, 1], [8, 2]]),
            torch.ones(2, 2).long(),
        ),
        "gather_rms_norm": (rows, index, torch.ones(16)),
        "gather_rows": (rows, index),
        "merge_rows": (rows, k[:, 0, :2], index),
        "k_centres": (q @ q.mT, torch.full((2, 4), 3), 5),
        "power_iterate": (q, k),
        "prompt_attention": (q, k, k),
        "prompt_attention_mass": (q, k, k),
        "prompt_attention_peak": (q, k, k, None, None, 5),
        "replay_attention": (q, k, k, k, k, groups, rows_of_entries(groups, k.shape[2]), k.shape[2]),
        "fit_masses": (rows.abs(), torch.full(rows.shape[:1], rows.shape[1]), 0.3, 3, 20.0),
        "top_places": (rows[..., 0], 3),
        "rotary": (q, k, POSITION, INV_FREQ),
        "rotary_": (q, k, POSITION, INV_FREQ),
        "rotary_table": (POSITION, INV_FREQ),
        "swiglu": (rows, rows),
    }


@pytest.mark.parametrize(
    "layout", ["dense", *(pytest.param(f"by {what}", marks=pytest.mark.slow) for what in ("tokens", "columns"))]
)
@pytest.mark.parametrize("op", calls("dense"))
def test_fakes(op, layout):
    overload = getattr(torch.ops.mminfer, op).default
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(overload, calls(layout)[op], {"backend": "triton"}, test_utils=checks)
