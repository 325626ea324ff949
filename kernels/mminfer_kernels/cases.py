"""Launches that stand for each op's use in a model of 7B parameters: what the ahead-of-time compiler compiles.

Inputs lie on the CPU unread and nothing runs: the ops' own code decides arguments and grids, as in a real call.
"""

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from mminfer_kernels.launching import Launch, recorded_launches
from mminfer_kernels.replay_attention import rows_of_entries

HEADS, GROUPS, TOKENS, HIDDEN, FFN = 28, 4, 8192, 3584, 18944
HEAD_SIZES = {torch.bfloat16: (64, 80, 128, 256), torch.float16: (128,), torch.float32: (64, 128, 256)}
FRAME = 1024  # visual tokens that are matched with each other
FRAMES = 8
PIECE = 128  # entries of a picture of which some are chosen


@dataclass(frozen=True)
class Case:
    """One call of an op.

    Args:
        op: its public name.
        label: what sets the call apart from others of the op.
        dtype: of its tensors.
        size: head size, or columns where there are no heads.
        launches: the kernels that it launched.
    """

    op: str
    label: str
    dtype: torch.dtype
    size: int
    launches: list[Launch]


def cases(
    ops: tuple[str, ...] | None = None, dtypes: tuple[str, ...] = (), sizes: tuple[int, ...] = ()
) -> Iterator[Case]:
    """All cases, or those of these ops, dtypes and sizes."""
    for dtype, head_sizes in HEAD_SIZES.items():
        if dtypes and str(dtype).removeprefix("torch.") not in dtypes:
            continue
        calls = [(size, call) for size in head_sizes for call in _attention_calls(dtype, size)]
        calls += [(HIDDEN, call) for call in _row_calls(dtype)]
        for size, (op, folder, label, call) in calls:
            if (ops is None or op in ops) and (not sizes or size in sizes):
                function = getattr(importlib.import_module(f"mminfer_kernels.{folder}.triton_kernel"), op)
                with recorded_launches() as launches:
                    call(function)
                yield Case(op, label, dtype, size, launches)


Calls = list[tuple[str, str, str, Callable[[Callable], object]]]  # op, folder, label, call of the op's function


def _attention_calls(dtype: torch.dtype, size: int) -> Calls:
    q = torch.empty(1, HEADS, TOKENS, size, dtype=dtype)
    k = torch.empty(1, GROUPS, TOKENS, size, dtype=dtype)
    few, weights = torch.arange(0, TOKENS, 8), torch.empty(1, HEADS, TOKENS)
    mass = weights[:, :GROUPS]
    starts, kept = torch.zeros(1, dtype=torch.int64), torch.zeros(1, GROUPS, TOKENS, dtype=torch.int64)
    packed = torch.arange(0, TOKENS + 1, TOKENS // 4)
    rows, masses = k.view(-1, size), torch.empty(GROUPS * TOKENS)
    segments = [torch.tensor([x]) * TOKENS // 8 for x in ([0, 20, 28, 30], [20, 8, 2, 2])]  # first rows and lengths
    position = torch.zeros(3, 1, TOKENS, dtype=torch.float64)
    inv_freq, axes = torch.empty(size // 2), [j % 3 for j in range(size // 2)]
    cos = torch.empty(1, TOKENS, size, dtype=dtype)
    scale, last = size**-0.5, q[:, :, -1:]
    fourth, (first, lengths) = q[:, :, : TOKENS // 4], (x[0] for x in segments)
    few_groups = _groups()
    column, prompt, decode = "column_mass", "prompt_attention", "decode_attention"
    replay, own = "replay_attention", k[:, :, : TOKENS // 4]
    packed_prompt, packed_decode = f"packed_{prompt}", f"packed_{decode}"
    return [
        ("column_mass", column, "", lambda f: f(q, k, None, scale, True, None)),
        ("column_mass", column, "weights", lambda f: f(q, k, weights, scale, True, None)),
        ("column_mass", column, "packed", lambda f: f(q, k, None, scale, False, None, packed)),
        ("power_iterate", column, "", lambda f: f(q, k, 5, scale, None)),
        ("prompt_attention", prompt, "", lambda f: f(q, k, k, scale, None, None)),
        ("prompt_attention", prompt, "window", lambda f: f(q, k, k, scale, None, 1024)),
        ("prompt_attention", prompt, "subset", lambda f: f(q[:, :, : len(few)], k, k, scale, few, None)),
        ("prompt_attention_mass", prompt, "", lambda f: f(q, k, k, None, scale, None)),
        ("prompt_attention_peak", prompt, "", lambda f: f(q[:, :, : TOKENS // 2], k, k, scale, None, TOKENS // 2)),
        ("prompt_attention_peak", prompt, "log_mass", lambda f: f(q, k, k, scale, None, TOKENS, mass)),
        (packed_prompt, packed_prompt, "", lambda f: f(fourth, rows, rows, first, lengths, scale, None)),
        (replay, replay, "", lambda f: f(fourth, own, own, k, k, *few_groups, FRAME // 2, scale)),
        (decode, decode, "", lambda f: f(last, k, k, None, None)),
        (decode, decode, "padded", lambda f: f(last, k, k, starts, None)),
        (packed_decode, decode, "", lambda f: f(last, rows, rows, *segments, None, None, None)),
        (packed_decode, decode, "massed", lambda f: f(last, rows, rows, *segments, None, masses, None)),
        ("rotary", "rotary", "", lambda f: f(q, k, position[0], inv_freq, 1.0, None)),
        ("rotary", "rotary", "3 axes", lambda f: f(q, k, position, inv_freq, 1.0, axes)),
        ("rotary_table", "rotary", "3 axes", lambda f: f(position, inv_freq, 1.0, axes, dtype)),
        ("apply_rotary", "rotary", "", lambda f: f(q, k, cos, cos)),
        ("merge_rows", "merge_rows", "keys", lambda f: f(k[:, :, :FRAME], k, kept, None, None)),
        ("gather_rows", "rows", "keys", lambda f: f(k, few.expand(1, GROUPS, -1), -2)),
    ]  # fmt: skip


def _groups() -> tuple[torch.Tensor, torch.Tensor]:
    """A quarter of the tokens, in groups of half a frame, each before as many entries as a frame has."""
    starts = torch.arange(0, TOKENS // 4, FRAME // 2, dtype=torch.int32)
    entries = torch.arange(len(starts), dtype=torch.int32) * FRAME
    groups = torch.stack([starts, starts + FRAME // 2, entries, entries + FRAME], 1)
    return groups, rows_of_entries(groups, TOKENS)


def _row_calls(dtype: torch.dtype) -> Calls:
    hidden = torch.empty(1, TOKENS, HIDDEN, dtype=dtype)
    gate = torch.empty(1, FRAME, 2 * FFN, dtype=dtype)
    few = torch.arange(0, TOKENS, 2)
    frames = torch.zeros(FRAMES, FRAME // 2, HIDDEN, dtype=dtype)
    alike, kept = torch.empty(FRAMES * GROUPS, PIECE, PIECE), torch.empty(FRAMES * GROUPS, dtype=torch.int64)
    shares = torch.empty(GROUPS * FRAMES, FRAME // 4, 64 * HEADS // GROUPS)
    index, sizes = torch.arange(FRAME // 2).expand(FRAMES, -1), torch.empty(FRAMES, FRAME // 2)
    return [
        ("best_match", "best_match", "", lambda f: f(frames, frames)),
        ("k_centres", "k_centres", "", lambda f: f(alike, kept, PIECE, kept)),
        ("merge_rows", "merge_rows", "sizes", lambda f: f(frames, frames, index, sizes, sizes)),
        ("gather_rows", "rows", "", lambda f: f(hidden, few, -2)),
        ("add_rows", "rows", "", lambda f: f(hidden, few, hidden[:, : len(few)])),
        ("gather_rms_norm", "rows", "", lambda f: f(hidden, few, torch.empty(HIDDEN, dtype=dtype), 1e-6)),
        ("fit_masses", "fit_masses", "", lambda f: f(shares, torch.full((len(shares),), FRAME // 4), 0.3, 10, 20.0)),
        ("top_places", "top_places", "", lambda f: f(sizes.flatten(), FRAME, None)),
        ("swiglu", "rows", "", lambda f: f(*gate.chunk(2, -1))),
    ]
