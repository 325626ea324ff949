"""Calls of every op on random inputs of a size, with their FLOPs and the bytes that they must move.

FLOPs are those of the formula that an op has for torch's counter, where it has one; of element-wise ops every addition,
multiplication, division and exponential counts one. Bytes are inputs read once and results written once. The first
argument of each function gives device and dtype.
"""

import mminfer_kernels as ops
import torch
from mminfer_kernels import DecoderWeights, LayerCache, LayerWeights
from mminfer_kernels.counts import bytes_of
from mminfer_kernels.replay_attention import rows_of_entries
from torch import Tensor
from torch.utils.flop_counter import flop_registry

from benchmarks.kernels.call import Call

HEADS, GROUPS, SIZE = 14, 2, 64  # LLaVA-OneVision-0.5B's


def _normal(like: Tensor, *shape: int) -> Tensor:
    return torch.randn(shape, device=like.device, dtype=like.dtype)


def _counted(op: str, *inputs: object, **settings: object) -> int:
    """FLOPs by the formula that the op has for torch's counter; nothing runs."""
    return flop_registry[getattr(torch.ops.mminfer, op)](*inputs, **settings)


def _prompt(like: Tensor, tokens: int, heads: int = HEADS, groups: int = GROUPS) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (_normal(like, 1, h, tokens, SIZE) for h in (heads, groups, groups))
    return q, k, v


def _strided(like: Tensor, tokens: int, stride: int) -> Tensor:
    """Places of every so-manieth token, the last one among them."""
    return torch.arange(tokens - 1, -1, -stride, device=like.device).flip(0)


def _mass_bytes(q: Tensor, k: Tensor) -> int:
    return 4 * q.shape[1] * k.shape[2]


def prompt_attention(like: Tensor, tokens: int) -> Call:
    """Beside it, attention with the scores of cache compression."""
    q, k, v = _prompt(like, tokens)
    index = _strided(like, tokens, 8)

    def with_strided() -> None:
        ops.prompt_attention(q, k, v)
        ops.column_mass(q[:, :, index], k, query_index=index)

    return Call(
        "prompt_attention",
        ops.prompt_attention,
        (q, k, v),
        flops=_counted("prompt_attention", q, k, v),
        moved=bytes_of(q, k, v) + q.nbytes,
        rest=(SIZE**-0.5, None, None),
        beside={
            "with exact scores": lambda: ops.prompt_attention_mass(q, k, v),
            "with strided scores": with_strided,
        },
    )


def prompt_attention_mass(like: Tensor, tokens: int) -> Call:
    """Logits counted once, as if every backend shared them between attention and scores."""
    q, k, v = _prompt(like, tokens)
    attention = _counted("prompt_attention", q, k, v)
    return Call(
        "prompt_attention_mass",
        ops.prompt_attention_mass,
        (q, k, v),
        flops=attention + attention // (2 * SIZE),
        moved=bytes_of(q, k, v) + q.nbytes + _mass_bytes(q, k),
        rest=(None, SIZE**-0.5, None),
    )


def prompt_attention_peak(like: Tensor, tokens: int) -> Call:
    """Half of the tokens behind the entries of the other half, as where a context is replayed behind its cache.

    Logits counted once, as if every backend shared them between attention and scores.
    """
    q, k, v = _prompt(like, tokens)
    q, entries = q[:, :, tokens // 2 :].contiguous(), tokens // 2
    return Call(
        "prompt_attention_peak",
        ops.prompt_attention_peak,
        (q, k, v),
        flops=_counted("prompt_attention", q, k, v),
        moved=bytes_of(q, k, v) + q.nbytes + 4 * k.shape[1] * entries,
        settings={"counted": entries},
        rest=(SIZE**-0.5, None, entries),
        beside={"the attention alone": lambda: ops.prompt_attention(q, k, v)},
    )


def replay_attention(like: Tensor, tokens: int) -> Call:
    """All tokens once more, in four groups, each behind the quarter of the entries that it made."""
    q, keys, values = _prompt(like, tokens)
    k, v = _normal(like, *keys.shape), _normal(like, *values.shape)
    edges = torch.arange(5, dtype=torch.int32) * tokens // 4
    groups = torch.stack([edges[:-1], edges[1:], edges[:-1], edges[1:]], 1)
    longest, seen = int(edges.diff().max()), rows_of_entries(groups, tokens)
    there = groups.to(like.device), seen.to(like.device), longest
    return Call(
        "replay_attention",
        ops.replay_attention,
        (q, k, v, keys, values),
        flops=_counted("replay_attention", q, k, v, keys, values, groups),
        moved=bytes_of(q, k, v, keys, values) + q.nbytes + 4 * keys.shape[1] * tokens,
        settings=dict(zip(("groups", "seen", "longest"), there, strict=True)),
        rest=(*there, SIZE**-0.5),
    )


def fit_masses(like: Tensor, heads: int, kept: int, queries: int) -> Call:
    shares = torch.rand(heads, kept, queries, device=like.device).div_(queries)
    counts, settings = torch.full((heads,), kept, device=like.device), {"ridge": 0.3, "iterations": 10, "most": 20.0}
    return Call(
        "fit_masses",
        ops.fit_masses,
        (shares,),
        flops=_counted("fit_masses", shares, counts, **settings),
        moved=bytes_of(shares) + 4 * heads * kept,
        settings={"counts": counts, **settings},
        rest=(counts, *settings.values()),
    )


def top_places(like: Tensor, tokens: int) -> Call:
    """A quarter of all places. No product: bytes alone."""
    score = torch.rand(tokens, device=like.device)
    return Call(
        "top_places",
        ops.top_places,
        (score,),
        flops=0,
        moved=bytes_of(score) + 2 * tokens,
        settings={"count": tokens // 4},
        rest=(tokens // 4, None),
    )


def column_mass(like: Tensor, tokens: int, stride: int = 1) -> Call:
    """Of all queries, or of every `stride`-th."""
    q, k, _ = _prompt(like, tokens)
    index = None if stride == 1 else _strided(like, tokens, stride)
    q = q if index is None else q[:, :, index]
    return Call(
        "column_mass",
        ops.column_mass,
        (q, k),
        flops=_counted("column_mass", q, k, query_index=index),
        moved=bytes_of(q, k) + _mass_bytes(q, k),
        settings={"query_index": index},
        rest=(None, SIZE**-0.5, True, index),
    )


def power_iterate(like: Tensor, tokens: int) -> Call:
    q, k, _ = _prompt(like, tokens)
    iterations, temperature = 5, 0.1
    return Call(
        "power_iterate",
        ops.power_iterate,
        (q, k),
        flops=_counted("power_iterate", q, k, iterations),
        moved=bytes_of(q, k) + _mass_bytes(q, k),
        settings={"iterations": iterations, "temperature": temperature},
        rest=(iterations, SIZE**-0.5 / temperature, None),
    )


def best_match(like: Tensor, rows: int, columns: int) -> Call:
    """All of the rows against as many others; each has one that is clearly its own."""
    dst = _normal(like, rows, columns)
    src = dst[torch.randperm(rows, device=like.device)] + _normal(like, rows, columns) / 2
    return Call(
        "best_match",
        ops.best_match,
        (src, dst),
        flops=_counted("best_match", src, dst),
        moved=bytes_of(src, dst) + (4 + 8) * rows,
    )


def k_centres(like: Tensor, pieces: int, points: int) -> Call:
    """A fifth of the points of each piece, by the cosines of their keys."""
    keys = torch.nn.functional.normalize(_normal(like, pieces, points, SIZE), dim=-1)
    similarity, most = keys @ keys.mT, points // 5
    counts = torch.full((pieces,), most, device=like.device)
    return Call(
        "k_centres",
        ops.k_centres,
        (similarity, counts),
        flops=_counted("k_centres", similarity, counts, most),
        moved=bytes_of(similarity, counts) + 8 * pieces * (most + points),
        settings={"most": most},
        rest=(most,),
    )


def merge_rows(like: Tensor, rows: int, columns: int) -> Call:
    """As many rows merged as there are to merge into, weighted."""
    dst, src = _normal(like, rows, columns), _normal(like, rows, columns)
    index, weight = torch.randint(0, rows, (rows,), device=like.device), torch.rand(rows, device=like.device) + 1
    return Call(
        "merge_rows",
        ops.merge_rows,
        (dst, src, index, weight, weight),
        flops=2 * (dst.numel() + src.numel()),
        moved=bytes_of(dst, src, index, weight, weight) + dst.nbytes + 4 * rows,
    )


def gather_rows(like: Tensor, tokens: int, kept: int, columns: int) -> Call:
    x, index = _normal(like, tokens, columns), _strided(like, tokens, tokens // kept)
    moved = 2 * len(index) * columns * x.element_size() + bytes_of(index)
    return Call("gather_rows", ops.gather_rows, (x, index), 0, moved, rest=(-2,))


def gather_rms_norm(like: Tensor, tokens: int, kept: int, columns: int) -> Call:
    """What a skipped FFN leaves to compute."""
    x, index = _normal(like, tokens, columns), _strided(like, tokens, tokens // kept)
    weight = _normal(like, columns)
    moved = 2 * len(index) * columns * x.element_size() + bytes_of(index, weight)
    flops = 4 * len(index) * columns
    return Call("gather_rms_norm", ops.gather_rms_norm, (x, index, weight), flops, moved, rest=(1e-6,))


def add_rows(like: Tensor, tokens: int, kept: int, columns: int) -> Call:
    x, index = _normal(like, tokens, columns), _strided(like, tokens, tokens // kept)
    added = _normal(like, len(index), columns)
    moved = 3 * added.nbytes + bytes_of(index)
    return Call("add_rows", ops.add_rows, (x, index, added), added.numel(), moved, {"inplace": True}, mutates=True)


def row_dots(like: Tensor, lines: int, columns: int) -> Call:
    """Of the tokens of a square grid with those to their right."""
    x, at = _normal(like, lines * lines, columns), torch.arange(lines * lines - 1, device=like.device)
    flops, moved = 2 * len(at) * columns, bytes_of(x, at, at) + 4 * len(at)
    return Call("row_dots", ops.row_dots, (x, at, at + 1), flops, moved)


def grow_regions(like: Tensor, lines: int, columns: int) -> Call:
    """Of a square grid whose lower half is blank: squares of two by two. With noise a rounding would choose."""
    grid = torch.arange(lines * lines, device=like.device).view(lines, lines)
    pairs = torch.cat([torch.stack([grid[:, :-1].flatten(), grid[:, 1:].flatten()]),
                       torch.stack([grid[:-1].flatten(), grid[1:].flatten()])], 1)  # fmt: skip
    x = _normal(like, lines * lines, columns)
    x[len(x) // 2 :] = 1
    sizes = torch.ones(len(x), device=like.device)
    flops = 2 * (pairs.shape[1] + 2 * len(x)) * columns  # at least: each pair once
    moved = bytes_of(x, sizes, pairs) + 8 * len(x)
    return Call("grow_regions", ops.grow_regions, (x, sizes, pairs, 0.99, 4), flops, moved, rest=(None, None, None))


def swiglu(like: Tensor, rows: int, columns: int) -> Call:
    gate, up = _normal(like, rows, columns), _normal(like, rows, columns)
    return Call("swiglu", ops.swiglu, (gate, up), 4 * gate.numel(), 3 * gate.nbytes)


def _rotation(like: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """Positions in steps of a sixteenth, and frequencies."""
    position = torch.arange(tokens, device=like.device)[None].double() / 16
    return position, 1e6 ** -(torch.arange(0, SIZE, 2, device=like.device) / SIZE)


def rotary(like: Tensor, tokens: int) -> Call:
    """In place."""
    (q, k, _), (position, inv_freq) = _prompt(like, tokens), _rotation(like, tokens)
    flops = 3 * (q.numel() + k.numel()) + 6 * tokens * len(inv_freq)
    moved = 2 * bytes_of(q, k) + bytes_of(position, inv_freq)
    inputs = q, k, position, inv_freq
    return Call("rotary", ops.rotary_, inputs, flops, moved, rest=(1.0, None), mutates=True)


def rotary_table(like: Tensor, tokens: int) -> Call:
    position, inv_freq = _rotation(like, tokens)
    moved = bytes_of(position, inv_freq) + 2 * tokens * SIZE * like.element_size()
    return Call(
        "rotary_table",
        ops.rotary_table,
        (position, inv_freq),
        flops=6 * tokens * len(inv_freq),
        moved=moved,
        settings={"dtype": like.dtype},
        rest=(1.0, None, like.dtype),
    )


def apply_rotary(like: Tensor, tokens: int) -> Call:
    q, k, _ = _prompt(like, tokens)
    cos, sin = ops.rotary_table(*_rotation(like, tokens), dtype=like.dtype)
    flops, moved = 3 * (q.numel() + k.numel()), 2 * bytes_of(q, k) + bytes_of(cos, sin)
    return Call("apply_rotary", ops.apply_rotary, (q, k, cos, sin), flops, moved)


def decode_attention(like: Tensor, keys: int, heads: int, groups: int, batch: int = 4) -> Call:
    """One query a sequence; the sequences fill all, seven eighths, three quarters and half of the cache."""
    q, k, v = (_normal(like, batch, h, n, SIZE) for h, n in ((heads, 1), (groups, keys), (groups, keys)))
    starts = torch.tensor([0, keys // 8, keys // 4, keys // 2], device=like.device)[:batch]
    valid = int((keys - starts).sum())
    return Call(
        "decode_attention",
        ops.decode_attention,
        (q, k, v, starts),
        flops=4 * heads * SIZE * valid,
        moved=2 * groups * SIZE * valid * k.element_size() + 2 * q.nbytes,
        rest=(None,),
    )


def packed_decode_attention(like: Tensor, keys: int, heads: int, groups: int) -> Call:
    """One query of one sequence, whose heads have a half of the keys, a quarter and so on; two have the same.

    Beside it, the attention over as many entries that every head has as many of.
    """
    lengths = [keys >> min(g + 1, groups - 1) for g in range(groups)]
    lengths[-1] = keys - sum(lengths[:-1])
    counts = torch.tensor([lengths], device=like.device)
    q, k, v = _normal(like, 1, heads, 1, SIZE), _normal(like, keys, SIZE), _normal(like, keys, SIZE)
    first = counts.cumsum(1) - counts
    alike = [x.view(1, groups, keys // groups, SIZE) for x in (k, v)]
    return Call(
        "packed_decode_attention",
        ops.packed_decode_attention,
        (q, k, v, first, counts),
        flops=4 * heads // groups * SIZE * keys,
        moved=bytes_of(q, k, v, first, counts) + q.nbytes,
        settings={"longest": max(lengths)},
        rest=(None, None, None),
        beside={"heads alike": lambda: ops.decode_attention(q, *alike)},
    )


def packed_prompt_attention(like: Tensor, tokens: int, keys: int, heads: int, groups: int) -> Call:
    """Queries behind keys of which the heads have a half, a quarter and so on beside their own.

    Beside it, one call a head, as where nothing takes packed keys.
    """
    counts = torch.tensor([tokens + (keys >> (g + 1)) for g in range(groups)], device=like.device)
    q, k, v = _normal(like, 1, heads, tokens, SIZE), *(_normal(like, int(counts.sum()), SIZE) for _ in range(2))
    inputs = (q, k, v, counts.cumsum(0) - counts, counts)
    parts = [x[None, None].split(counts.tolist(), 2) for x in (k, v)]

    def one_by_one() -> None:
        for of_head in zip(q.chunk(groups, 1), *parts, strict=True):
            ops.prompt_attention(*of_head)

    return Call(
        "packed_prompt_attention",
        ops.packed_prompt_attention,
        inputs,
        flops=_counted("packed_prompt_attention", *inputs),
        moved=bytes_of(*inputs) + q.nbytes,
        rest=(SIZE**-0.5, None),
        beside={"head by head": one_by_one},
    )


def decode_step(like: Tensor, layers: int, entries: int, hidden: int, inner: int, vocabulary: int) -> Call:
    """One token of one sequence."""
    weights = _decoder(like, layers, hidden, inner, vocabulary)
    caches = [
        LayerCache(*(_normal(like, 1, GROUPS, entries + 1, SIZE) for _ in range(2)), None, entries)
        for _ in range(layers)
    ]
    position = torch.full((1, 1), float(entries), device=like.device, dtype=torch.float64)
    cos, sin = (x[:, 0] for x in ops.rotary_table(position, _rotation(like, 1)[1], dtype=like.dtype))
    hidden_states = _normal(like, 1, hidden)
    matrices = sum(x.numel() for x in weights.tensors if x.dim() == 2)
    held = sum(bytes_of(cache.keys, cache.values) for cache in caches)
    return Call(
        "decode_step",
        ops.decode_step,
        (hidden_states, cos, sin, weights, caches),
        flops=2 * matrices + 4 * layers * HEADS * SIZE * (entries + 1),
        moved=weights.nbytes + held + vocabulary * like.element_size(),
        mutates=True,
    )


def _decoder(like: Tensor, layers: int, hidden: int, inner: int, vocabulary: int) -> DecoderWeights:
    """Layers with biases at q, k and v, as Qwen2's."""

    def matrix(out: int, width: int) -> Tensor:
        return _normal(like, out, width) * width**-0.5

    def layer() -> LayerWeights:
        projections = [x for heads in (HEADS, GROUPS, GROUPS) for x in _biased(like, heads * SIZE, hidden)]
        ffn = (matrix(inner, hidden), None, matrix(inner, hidden), None, matrix(hidden, inner), None)
        norms = like.new_ones(hidden), like.new_ones(hidden)
        return LayerWeights(norms[0], *projections, matrix(hidden, HEADS * SIZE), None, None, None, norms[1], *ffn)

    stack = tuple(layer() for _ in range(layers))
    head = matrix(vocabulary, hidden)
    return DecoderWeights(stack, like.new_ones(hidden), head, HEADS, GROUPS, SIZE, 1e-6, SIZE**-0.5)


def _biased(like: Tensor, out: int, width: int) -> tuple[Tensor, Tensor]:
    return _normal(like, out, width) * width**-0.5, _normal(like, out)
