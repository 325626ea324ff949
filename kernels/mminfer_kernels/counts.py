"""What each Triton kernel moves and computes, against the least that its result needs: one formula a kernel.

`moved` is the traffic between DRAM and L2. Blocks that run side by side share what they read as long as it fits L2; a
set that does not is counted once for each block that reads it. `asked` is what the blocks ask of L2, every repeat
counted. `flops` counts whole tiles: masked pairs, padded rows and padded columns too.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

L2_BYTES = 40 * 2**20  # A100's, the smallest of the targets'


@dataclass(frozen=True)
class Count:
    """Bytes and FLOPs of one launch."""

    least_bytes: int
    moved_bytes: int
    asked_bytes: int
    least_flops: int
    flops: int


def bytes_of(*tensors: torch.Tensor | None) -> int:
    """Bytes behind the tensors, an expanded dimension counted once."""
    return sum(_elements(x) * x.element_size() for x in tensors if x is not None)


def _elements(x: torch.Tensor) -> int:
    count = 1
    for size, stride in zip(x.shape, x.stride(), strict=True):
        count *= size if stride else min(size, 1)
    return count


def _shared(set_bytes: int, asked_bytes: int) -> int:
    """What reaches DRAM of reads that many blocks repeat."""
    return min(set_bytes, asked_bytes) if set_bytes <= L2_BYTES else asked_bytes


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _spans(lo: torch.Tensor, hi: torch.Tensor, block: int, step: int) -> tuple[int, int]:
    """Pairs in the ranges `lo .. hi - 1`, and steps of `step` taken by blocks of `block` ranges."""
    pairs = int((hi - lo).clamp_min(0).sum())
    first, last = torch.arange(0, len(lo), block), torch.arange(block - 1, len(lo) + block - 1, block)
    begin, end = lo[first] // step * step, hi[last.clamp_max(len(lo) - 1)]
    return pairs, int(((end - begin).clamp_min(0) + step - 1).div(step, rounding_mode="floor").sum())


def _key_spans(a: dict[str, Any], causal: bool) -> tuple[int, int]:
    rows, keys = a["S"], a["N"]
    last = torch.arange(keys - rows + 1, keys + 1) if causal else torch.full((rows,), keys)
    hi = last if a["hi"] is None else a["hi"].long()
    lo = torch.zeros_like(hi) if a["lo"] is None else a["lo"].long()
    return _spans(lo, hi, a["BLOCK_S"], a["BLOCK_N"])


def _row_spans(a: dict[str, Any]) -> tuple[int, int]:
    rows, keys = a["S"], a["N"]
    first = torch.arange(rows - keys, rows).clamp_min(0) if a["CAUSAL"] else torch.zeros(keys, dtype=torch.int64)
    lo = first if a["row_lo"] is None else a["row_lo"].long()
    hi = torch.full((keys,), rows) if a["row_hi"] is None else a["row_hi"].long()
    return _spans(lo, hi, a["BLOCK_N"], a["BLOCK_S"])


def row_lse(a: dict[str, Any]) -> Count:
    heads = a["q"].shape[0] * a["q"].shape[1]
    pairs, steps = _key_spans(a, a["CAUSAL"])
    keys = heads * steps * a["BLOCK_N"] * a["D"] * a["k"].element_size()
    own = bytes_of(a["q"], a["lse"])
    extra = bytes_of(a["lo"], a["hi"])
    return Count(
        own + bytes_of(a["k"]),
        own + extra + _shared(bytes_of(a["k"]), keys),
        own + heads * extra + keys,
        2 * heads * pairs * a["D"],
        2 * heads * steps * a["BLOCK_S"] * a["BLOCK_N"] * a["BLOCK_D"],
    )


def column_mass(a: dict[str, Any]) -> Count:
    heads = a["q"].shape[0] * a["q"].shape[1]
    pairs, steps = _row_spans(a)
    streamed = bytes_of(a["q"], a["lse"], a["weights"])
    a_row = a["D"] * a["q"].element_size() + 4 + (0 if a["weights"] is None else 4 * a["votes"])
    asked = heads * steps * a["BLOCK_S"] * a_row
    own = bytes_of(a["out"]) * (2 if a["ACCUMULATE"] else 1)
    own += 0 if a["log_mass"] is None else 4 * a["out"].numel() // a["repeat"]
    keys = heads * a["N"] * a["D"] * a["k"].element_size()
    extra = bytes_of(a["row_lo"], a["row_hi"])
    of_a_head = streamed // heads
    return Count(
        own + bytes_of(a["k"]) + streamed,
        own + extra + _shared(bytes_of(a["k"]), keys) + (streamed if of_a_head <= L2_BYTES else asked),
        own + heads * extra + keys + asked,
        2 * heads * pairs * (a["D"] + a["votes"]),
        2 * heads * steps * a["BLOCK_S"] * a["BLOCK_N"] * (a["BLOCK_D"] + a["VOTES"]),
    )


def prompt_attention(a: dict[str, Any]) -> Count:
    heads = a["q"].shape[0] * a["q"].shape[1]
    pairs, steps = _packed_spans(a) if a["lengths"] is not None else (heads * x for x in _key_spans(a, True))
    keys = 2 * steps * a["BLOCK_N"] * a["D"] * a["k"].element_size()
    own = bytes_of(a["q"], a["out"], a["lse"], a["log_mass"])
    extra = bytes_of(a["lo"], a["hi"], a["first"], a["lengths"])
    groups = a["k"].shape[0] * a["k"].shape[1]
    of_a_group = bytes_of(a["k"], a["v"]) // groups
    return Count(
        own + bytes_of(a["k"], a["v"]),
        own + extra + (bytes_of(a["k"], a["v"]) if of_a_group <= L2_BYTES else keys),
        own + heads * extra + keys,
        4 * pairs * a["D"],
        4 * steps * a["BLOCK_S"] * a["BLOCK_N"] * a["BLOCK_D"],
    )


def _packed_spans(a: dict[str, Any]) -> tuple[int, int]:
    """Pairs and steps of all query heads."""
    lengths = a["lengths"].tolist()
    own = [{**a, "N": n, "hi": None if a["hi"] is None else a["hi"] + n} for n in lengths]
    pairs, steps = zip(*(_key_spans(x, True) for x in own), strict=True)
    return a["repeat"] * sum(pairs), a["repeat"] * sum(steps)


def replay_attention(a: dict[str, Any]) -> Count:
    heads, size = a["q"].shape[0] * a["q"].shape[1], a["k"].element_size() * a["D"]
    pairs = tiles = asked = 0
    for start, stop, begin, end in a["groups"].tolist():
        rows, held, ahead = stop - start, end - begin, int(begin > 0)
        blocks = _cdiv(rows, a["BLOCK_S"])
        own = sum(_cdiv(min((i + 1) * a["BLOCK_S"], rows), a["BLOCK_N"]) for i in range(blocks))
        pairs += rows * (held + ahead) + rows * (rows + 1) // 2
        tiles += blocks * (_cdiv(held, a["BLOCK_N"]) + ahead) + own
        asked += 2 * size * (blocks * (held + ahead) + own * a["BLOCK_N"])
    held = 2 * size * sum(end - begin for begin, end in {(b, e) for _, _, b, e in a["groups"].tolist()})
    own = bytes_of(a["q"], a["out"], a["lse"], a["own_k"], a["own_v"])
    read = held * a["k"].shape[0] * a["k"].shape[1]
    return Count(
        own + read,
        own + read + bytes_of(a["groups"]),
        bytes_of(a["q"], a["out"], a["lse"]) + heads * asked,
        4 * heads * pairs * a["D"],
        4 * heads * tiles * a["BLOCK_S"] * a["BLOCK_N"] * a["BLOCK_D"],
    )


def fit_masses(a: dict[str, Any]) -> Count:
    heads, passes = a["out"].shape[0], a["iterations"] + 2
    one, scratch = bytes_of(a["shares"], a["out"]), bytes_of(a["ahead"], a["wanted"], a["step"])
    of_a_head = bytes_of(a["shares"]) // heads
    again = 0 if of_a_head <= L2_BYTES else (passes - 1) * bytes_of(a["shares"])
    flops = 4 * a["shares"].numel() * passes
    tiles = heads * _cdiv(a["K"], a["BLOCK_K"]) * a["BLOCK_K"] * a["BLOCK_R"]
    asked = passes * (one + scratch)
    return Count(one, one + again, asked, flops, 4 * tiles * passes)


def top_places(a: dict[str, Any]) -> Count:
    read = bytes_of(a["score"], a["among"])
    moved = read + bytes_of(a["out"])
    return Count(moved, moved, moved + 34 * read, 0, 0)


def decode_attention(a: dict[str, Any]) -> Count:
    batch, _, queries, size = a["q"].shape
    if a["lengths"] is not None:
        lengths = a["lengths"]
        parts = _cdivs(lengths, a["part_keys"])  # further ones end at once
    else:
        lengths = torch.full((batch, a["G"]), a["T"])
        parts = torch.full_like(lengths, len(a["out"]))
    valid = int(lengths.sum()) - (0 if a["starts"] is None else a["G"] * int(a["starts"].sum()))
    cache = 2 * valid * size * a["k"].element_size() + (0 if a["log_mass"] is None else 4 * valid)
    read = cache + bytes_of(a["q"])
    row_blocks, rows = _cdiv(a["repeat"] * queries, a["BLOCK_R"]), a["repeat"] * queries
    written = bytes_of(a["out"], a["lse"]) * int(parts.sum()) // (len(a["out"]) * batch * a["G"])
    result = a["q"].numel() * (a["q"].element_size() if a["lse"] is not None else a["out"].element_size())
    steps = int(_cdivs(lengths, a["BLOCK_N"]).sum())
    return Count(
        read + result,
        read + written,
        read * row_blocks + written,
        4 * rows * size * valid,
        4 * row_blocks * a["BLOCK_R"] * a["BLOCK_D"] * steps * a["BLOCK_N"],
    )


def _cdivs(lengths: torch.Tensor, step: int) -> torch.Tensor:
    return (lengths + step - 1).div(step, rounding_mode="floor")


def decode_merge(a: dict[str, Any]) -> Count:
    parts, whole = a["parts"].numel(), a["count"]
    if a["lengths"] is not None:
        parts = parts * int(_cdivs(a["lengths"], a["part_keys"]).sum()) // (whole * a["lengths"].numel())
    moved = bytes_of(a["parts"], a["lse"]) * parts // a["parts"].numel() + bytes_of(a["out"])
    return Count(moved, moved, moved, 2 * parts, 2 * parts)


def best_match(a: dict[str, Any]) -> Count:
    batch, sources, size = a["src"].shape
    blocks, own = _cdiv(sources, a["BLOCK_S"]), bytes_of(a["src_length"], a["similarity"], a["index"])
    steps = _cdiv(a["T"], a["BLOCK_T"])
    targets = bytes_of(a["dst"], a["dst_length"])
    working_set = (bytes_of(a["src"]) + targets) // batch
    asked = steps * bytes_of(a["src"]) + blocks * targets
    padded = blocks * a["BLOCK_S"] * steps * a["BLOCK_T"] * _cdiv(size, a["BLOCK_C"]) * a["BLOCK_C"]
    return Count(
        own + bytes_of(a["src"]) + targets,
        own + (bytes_of(a["src"]) + targets if working_set <= L2_BYTES else asked),
        own + asked,
        2 * batch * sources * a["T"] * size,
        2 * batch * padded,
    )


def k_centres(a: dict[str, Any]) -> Count:
    """Of as many centres as there are places for."""
    asked = 4 * a["counts"].numel() * a["MOST"] * a["N"]
    own = bytes_of(a["sums"], a["counts"], a["points"], a["centre"], a["owner"])
    flops = 2 * a["counts"].numel() * a["MOST"]
    return Count(own + asked, own + asked, own + asked, flops * a["N"], flops * a["BLOCK"])


def merge_rows(a: dict[str, Any]) -> Count:
    data = bytes_of(a["dst"], a["src"], a["out"], a["dst_weight"], a["src_weight"], a["weight"], a["order"])
    moved = data + bytes_of(a["offsets"])
    flops = 2 * (a["src"].numel() + a["dst"].numel())
    again = bytes_of(a["order"], a["offsets"], a["dst_weight"], a["src_weight"])
    return Count(data, moved, moved + (_cdiv(a["C"], a["BLOCK_C"]) - 1) * again, flops, flops)


def segments(a: dict[str, Any]) -> Count:
    moved = bytes_of(a["index"], a["order"], a["offsets"])
    blocks = _cdiv(max(a["K"], a["N"] + 1), a["BLOCK"])
    return Count(moved, moved, moved + blocks * bytes_of(a["index"]), 0, 0)


def add_rows(a: dict[str, Any]) -> Count:
    touched = int((a["offsets"].diff() > 0).sum()) * a["x"].shape[0] // len(a["offsets"])
    data = bytes_of(a["rows"], a["order"]) + 2 * touched * a["C"] * a["x"].element_size()
    moved = data + bytes_of(a["offsets"])
    again = (_cdiv(a["C"], a["BLOCK_C"]) - 1) * bytes_of(a["order"], a["offsets"])
    return Count(data, moved, moved + again, a["rows"].numel(), a["rows"].numel())


def gather_rows(a: dict[str, Any]) -> Count:
    moved = 2 * bytes_of(a["out"]) + bytes_of(a["index"])
    repeats = a["x"].shape[0] * a["x"].shape[1] // len(a["index"]) * _cdiv(a["C"], a["BLOCK_C"])
    return Count(moved, moved, moved + (repeats - 1) * bytes_of(a["index"]), 0, 0)


def gather_rms_norm(a: dict[str, Any]) -> Count:
    moved = 2 * bytes_of(a["out"]) + bytes_of(a["index"], a["weight"])
    rows = a["out"].numel() // a["C"]
    return Count(
        moved, moved, moved + (rows - 1) * bytes_of(a["weight"]), 4 * a["out"].numel(), 4 * rows * a["BLOCK_C"]
    )


def swiglu(a: dict[str, Any]) -> Count:
    moved = 3 * bytes_of(a["out"])
    return Count(moved, moved, moved, 4 * a["out"].numel(), 4 * a["out"].numel())


def rotary_table(a: dict[str, Any]) -> Count:
    moved = bytes_of(a["position"], a["quarters"], a["axes"], a["cos"], a["sin"])
    blocks, angles = _cdiv(a["N"], a["BLOCK_N"]), a["N"] * a["half"]
    asked = moved + (blocks - 1) * bytes_of(a["quarters"], a["axes"])
    return Count(moved, moved, asked, 6 * angles, 6 * blocks * a["BLOCK_N"] * a["BLOCK_P"])


def rotary(a: dict[str, Any]) -> Count:
    tables = bytes_of(a["position"], a["quarters"], a["axes"])
    moved = 2 * bytes_of(a["q"], a["k"]) + tables
    head_blocks, rotated = _cdiv(a["H"] + a["G"], a["HEADS"]), 3 * (a["q"].numel() + a["k"].numel())
    angles = 6 * a["q"].shape[0] * a["N"] * a["half"]
    return Count(moved, moved, moved + (head_blocks - 1) * tables, rotated + angles, rotated + head_blocks * angles)


def apply_rotary(a: dict[str, Any]) -> Count:
    tables = bytes_of(a["cos"], a["sin"])
    moved = bytes_of(a["x"], a["out"]) + tables
    asked = (
        moved
        + (_cdiv(a["H"], a["HEADS"]) * a["x"].shape[0] * a["N"] * a["half"] * 4 * a["cos"].element_size())
        - tables
    )
    return Count(moved, moved, asked, 3 * a["x"].numel(), 3 * a["x"].numel())


COUNTS: dict[str, Callable[[dict[str, Any]], Count]] = {
    f"{function.__name__}_fwd_kernel": function
    for function in (
        row_lse, column_mass, prompt_attention, replay_attention, fit_masses, top_places, decode_attention,
        decode_merge, best_match, k_centres, merge_rows, add_rows, gather_rows, gather_rms_norm, swiglu,
        rotary_table, rotary, apply_rotary, segments,
    )
}  # fmt: skip
