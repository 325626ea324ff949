"""No argument of a public op ends the process: drawn calls run in a process of their own."""

import os
import subprocess
import sys

import pytest
import torch
from mminfer_kernels import (
    OPS,
    BackendError,
    add_rows,
    apply_rotary,
    best_match,
    decode_attention,
    gather_rows,
    merge_rows,
    power_iterate,
    prompt_attention,
    rotary_,
    rotary_table,
)
from mminfer_kernels.checks import PlaceError

from tests.kernels import hostile

TWO_THREADS = {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive"}  # other tests run beside these
CALLED_OTHERWISE = {"rotary_", "packed_decode_step"}  # beside what is registered


def test_every_op_is_called():
    assert {*OPS, *CALLED_OTHERWISE} == hostile.OPS.keys()


def test_drawn_arguments_are_answered_or_refused(native, tmp_path):
    log = tmp_path / "call"
    command = [sys.executable, "-m", "tests.kernels.hostile", "--examples", "300", "--log", str(log)]
    run = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | TWO_THREADS)
    assert run.returncode == 0, (
        f"{log.read_text('utf-8') if log.exists() else ''}\n{run.stdout[-2000:]}{run.stderr[-4000:]}"
    )
    assert f"of {len(hostile.OPS)} ops" in run.stdout


Q, K = torch.randn(1, 4, 6, 8), torch.randn(1, 2, 6, 8)
X, INDEX = torch.randn(2, 5, 8), torch.tensor([[0, 4], [2, 5]])
HALVES, FREQUENCIES = torch.zeros(3, 1, 6).double(), torch.ones(4)
WRONG = {
    "window is 9223372036854775808": lambda to: prompt_attention(Q, K, K, window=2**63, **to),
    "window is -1": lambda to: prompt_attention(Q, K, K, window=-1, **to),
    "window is True": lambda to: prompt_attention(Q, K, K, window=True, **to),
    "scale is nan": lambda to: prompt_attention(Q, K, K, scale=float("nan"), **to),
    "iterations is 1152921504606846976": lambda to: power_iterate(Q, K, 2**60, **to),
    "a number of 333 bits": lambda to: power_iterate(Q, K, 10**100, **to),
    "heads of no element": lambda to: power_iterate(Q[..., :0], K[..., :0], **to),
    "one floating dtype": lambda to: decode_attention(Q, K.half(), K.half(), **to),
    "v is on meta": lambda to: decode_attention(Q, K, K.to("meta"), **to),
    "starts is on meta": lambda to: decode_attention(Q, K, K, torch.zeros(1).long().to("meta"), **to),
    "wanted at most 2147483647": lambda to: prompt_attention(
        Q, *[torch.zeros(1, 1, 1, 8).expand(1, 1, 2**31, 8)] * 2, **to
    ),
    "wanted a dense tensor": lambda to: best_match(X.to_sparse(), X, **to),
    "places from 0 to 4": lambda to: merge_rows(X, X[:, :2], INDEX, **to),
    r"wanted places from 0 to 4": lambda to: add_rows(X, INDEX, X[:, :2], **to),
    "wanted no overlap": lambda to: add_rows(X[:1].expand(2, 5, 8), INDEX % 5, X[:, :2], inplace=True, **to),
    "overlap in memory": lambda to: rotary_(Q, Q[:, 1:3], HALVES[0], FREQUENCIES, **to),
    "for cos": lambda to: apply_rotary(Q, K, torch.ones(3, 6, 8), torch.ones(3, 6, 8), **to),
    "sections.1. is -4": lambda to: rotary_table(HALVES, FREQUENCIES, sections=[8, -4], **to),
    "wanted .A, ..., N. with sections": lambda to: rotary_table(HALVES[:0], FREQUENCIES, sections=[4], **to),
    "dtype is torch.int64": lambda to: rotary_table(HALVES, FREQUENCIES, dtype=torch.int64, **to),
}


@pytest.mark.parametrize("backend", ["auto", "reference", "native", "triton"])
@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments_are_named_whatever_the_backend(message, backend):
    with pytest.raises(ValueError, match=message):
        WRONG[message]({"backend": backend})


def test_places_of_a_batch_stay_in_their_row():
    """The reference looks them up in rows laid end to end, where a place too large would be the next row's."""
    with pytest.raises(PlaceError, match="index runs from 0 to 5, wanted places from 0 to 4"):
        gather_rows(X, INDEX)
    with pytest.raises(IndexError):
        gather_rows(X, INDEX - 3)


def test_rows_that_are_part_of_what_they_are_added_to():
    x = torch.randn(6, 4)
    wanted = add_rows(x, torch.tensor([1, 2, 3]), x[:3].clone())
    for backend in ("native", "reference"):
        own = x.clone()
        assert torch.equal(add_rows(own, torch.tensor([1, 2, 3]), own[:3], inplace=True, backend=backend), wanted)


def test_parts_of_one_projection_are_turned_in_place(native):
    """They interleave in memory, and share none of it."""
    fused = torch.randn(1, 6, 6, 8)  # [B, N, H + G, D]
    q, k = fused.transpose(1, 2).split([4, 2], 1)
    wanted = q.clone(), k.clone()
    for x, y in ((q, k), wanted):
        rotary_(x, y, HALVES[0] + 3, FREQUENCIES, backend="native")
    assert torch.equal(q, wanted[0]) and torch.equal(k, wanted[1])


def test_memory_across_words_goes_to_the_reference(native):
    x = torch.frombuffer(bytearray(4 * 12 + 1), dtype=torch.float32, offset=1).view(3, 4)
    assert torch.equal(best_match(x, x)[0], torch.zeros(3))
    with pytest.raises(BackendError, match="cannot take"):
        best_match(x, x, backend="native")
