"""Calls of every op with sound and with hostile arguments, drawn at random: the native kernels against the reference.

    python -m tests.kernels.hostile --examples 2000

Each call must give what the reference gives, or be refused by a typed error: a crash ends this process, so the tests
run it as one of their own. What is about to be called stands in the file of `--log`.
"""

import argparse
import collections
import math
import os
from pathlib import Path
from random import Random

import mminfer_kernels
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from mminfer_kernels import (
    BackendError,
    DecoderWeights,
    LayerCache,
    LayerWeights,
    PackedLayerCache,
    Segments,
    build,
)
from mminfer_kernels.replay_attention import rows_of_entries
from torch import Tensor

SIZES = (0, 1, 2, 3, 7, 15, 16, 17, 33, 64, 65, 130)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
STRANGE_DTYPES = (*DTYPES, torch.float64, torch.int64, torch.int32, torch.bool, torch.complex64, torch.float8_e5m2)
NUMBERS = (
    *(0, -1, 1, 2, 2**31 - 1, 2**31, -(2**31), 2**32, 2**62, 2**63 - 1, 2**63, -(2**63), 2**64, 2**70, 10**400),
    *(0.0, -0.5, 1e-300, 1e30, 1e300, math.nan, math.inf, -math.inf, True, False, "8", None, [], 3 + 4j),
)  # fmt: skip
MOST_ELEMENTS = 10**6  # of tensors that are read here; larger ones are there to be refused
MOST_BYTES = 12 << 30
SANITIZED = "ASAN_OPTIONS" in os.environ
REFUSALS = (ValueError, BackendError, MemoryError)


def attention(draw: Random, scores: bool = False) -> dict:
    groups, repeat, keys, size = draw.choice((1, 2, 3)), draw.choice((1, 2, 5)), draw.choice(SIZES), draw.choice(SIZES)
    size = max(size, int(scores))
    places = sorted(draw.sample(range(keys), draw.randint(0, keys))) if draw.random() < 0.4 else None
    queries = draw.randint(0, keys) if places is None else len(places)
    batch, dtype = draw.choice((0, 1, 2)), draw.choice(DTYPES)
    shapes = (groups * repeat, queries), (groups, keys), (groups, keys)
    q, k, v = (torch.randn(batch, *shape, size).to(dtype) for shape in shapes)
    index = None if places is None else torch.tensor(places, dtype=torch.int64)
    return {"q": q, "k": k, "v": v, "scale": draw.choice((None, 0.3)), "query_index": index}


def prompt_attention(draw: Random) -> dict:
    arguments = attention(draw)
    return arguments | {"window": draw.choice((None, 1, 5, 1000)), "log_mass": log_mass(draw, arguments)}


def log_mass(draw: Random, arguments: dict) -> Tensor | None:
    return draw.choice((None, 3 * torch.rand(arguments["k"].shape[:3])))


def prompt_attention_mass(draw: Random) -> dict:
    arguments = attention(draw, scores=True)
    q = arguments["q"]
    return arguments | {"weights": draw.choice((None, torch.rand(q.shape[:3]), torch.rand(q.shape[0], q.shape[2])))}


def prompt_attention_peak(draw: Random) -> dict:
    arguments = attention(draw, scores=True)
    counted = draw.choice((None, draw.randint(0, arguments["k"].shape[2])))
    return arguments | {"counted": counted, "log_mass": log_mass(draw, arguments)}


def replay_attention(draw: Random) -> dict:
    count, size, dtype = draw.choice((0, 1, 2)), draw.choice(SIZES[1:]), draw.choice(DTYPES)
    entries, groups, rows = draw.choice(SIZES), draw.choice((1, 2)), 0
    edges = sorted(draw.randint(0, entries) for _ in range(2 * draw.randint(1, 3)))
    table = []
    for begin, end in zip(edges[::2], edges[1::2], strict=True):
        table.append((rows, rows := rows + draw.randint(1, 40), begin, end))
    table = torch.tensor(table, dtype=torch.int32)
    q = torch.randn(count, groups * draw.choice((1, 3)), rows, size).to(dtype)
    k, v = torch.randn(2, count, groups, rows, size).to(dtype)
    keys, values = torch.randn(2, count, groups, entries, size).to(dtype)
    seen, longest = rows_of_entries(table, entries), int((table[:, 1] - table[:, 0]).max())
    return {
        "q": q, "k": k, "v": v, "keys": keys, "values": values, "groups": table, "seen": seen, "longest": longest,
        "scale": draw.choice((None, 0.3)),
    }  # fmt: skip


def fit_masses(draw: Random) -> dict:
    heads, kept, queries = draw.choice((0, 1, 3)), draw.choice(SIZES), draw.choice(SIZES)
    shares, counts = torch.rand(heads, kept, queries), torch.randint(kept + 1, (heads,)).clamp_min(1)
    shares = shares * (torch.arange(kept) < counts[:, None])[..., None]
    return {"shares": shares, "counts": counts, "ridge": 0.3, "iterations": draw.choice((0, 1, 4)), "most": 20.0}


def top_places(draw: Random) -> dict:
    shape = (*draw.choice(((), (2,), (0,))), draw.choice(SIZES))
    score = draw.choice((torch.randn(shape), torch.randint(3, shape).half(), torch.rand(shape) < 0.5))
    return {
        "score": score,
        "count": draw.randint(0, shape[-1]),
        "among": draw.choice((None, torch.rand(shape) < 0.5)),
    }


def column_mass(draw: Random) -> dict:
    arguments = prompt_attention_mass(draw) | {"causal": draw.random() < 0.7, "temperature": draw.choice((1.0, 0.1))}
    del arguments["v"]
    if draw.random() < 0.2:
        keys = arguments["k"].shape[2]
        batch, heads, _, size = arguments["q"].shape
        q = torch.randn(batch, heads, keys, size).to(arguments["q"].dtype)
        ends = [0, *sorted(draw.randint(0, keys) for _ in range(2)), keys]
        return arguments | {"q": q, "weights": None, "query_index": None, "cu_seqlens": torch.tensor(ends)}
    return arguments


def power_iterate(draw: Random) -> dict:
    arguments = attention(draw, scores=True) | {"iterations": draw.choice((0, 1, 5)), "temperature": 0.3}
    del arguments["v"]
    return arguments


def decode_attention(draw: Random) -> dict:
    arguments = attention(draw)
    del arguments["query_index"]
    starts = [draw.randint(-3, arguments["k"].shape[2] + 3) for _ in range(len(arguments["q"]))]
    return arguments | {"starts": draw.choice((None, torch.tensor(starts, dtype=torch.int64)))}


def packed_prompt_attention(draw: Random) -> dict:
    groups, size, dtype = draw.choice((1, 2, 3)), draw.choice(SIZES[1:]), draw.choice(DTYPES)
    lengths = [draw.choice(SIZES) for _ in range(groups)]
    rows, reach = max(lengths) + draw.choice((0, 70)), min(lengths)
    index = sorted(-x - 1 for x in draw.sample(range(reach), draw.randint(0, reach))) if draw.random() < 0.4 else None
    queries = draw.randint(0, reach) if index is None else len(index)
    q = torch.randn(1, groups * draw.choice((1, 2, 5)), queries, size).to(dtype)
    first = [draw.randint(0, rows - length) for length in lengths]
    return {
        "q": q,
        "keys": torch.randn(rows, size).to(dtype),
        "values": torch.randn(rows, size).to(dtype),
        "first": torch.tensor(first),
        "lengths": torch.tensor(lengths),
        "query_index": None if index is None else torch.tensor(index, dtype=torch.int64),
        "log_mass": draw.choice((None, 3 * torch.rand(rows))),
    }


def packed_decode_attention(draw: Random) -> dict:
    groups, repeat, batch = draw.choice((1, 2, 3)), draw.choice((1, 2, 5)), draw.choice((0, 1, 2))
    size, rows, dtype = draw.choice(SIZES), draw.choice(SIZES[1:]), draw.choice(DTYPES)
    first = [[draw.randrange(rows) for _ in range(groups)] for _ in range(batch)]
    lengths = [[draw.randint(1, rows - start) for start in starts] for starts in first]
    of_heads = [torch.tensor(x, dtype=torch.int64).view(batch, groups) for x in (first, lengths)]
    shapes = (batch, groups * repeat, 1, size), (rows, size), (rows, size)
    q, keys, values = (torch.randn(shape).to(dtype) for shape in shapes)
    return {
        "q": q, "keys": keys, "values": values, "first": of_heads[0], "lengths": of_heads[1],
        "scale": draw.choice((None, 0.3)), "log_mass": draw.choice((None, torch.rand(rows))),
        "longest": draw.choice((None, rows)),
    }  # fmt: skip


def rows(draw: Random) -> tuple[Tensor, Tensor, Tensor]:
    """[..., T, C], [..., S, C] and for each of the latter a place among the former."""
    leading = draw.choice(((), (1,), (3,), (2, 2), (0,)))
    targets, sources, columns = draw.choice(SIZES[1:]), draw.choice(SIZES), draw.choice(SIZES)
    dtype = draw.choice(DTYPES)
    x, other = (torch.randn(*leading, n, columns).to(dtype) for n in (targets, sources))
    return x, other, torch.randint(targets, (*leading, sources))


def best_match(draw: Random) -> dict:
    dst, src, _ = rows(draw)
    return {"src": src, "dst": dst}


def k_centres(draw: Random) -> dict:
    leading, count = draw.choice(((), (3,), (2, 2), (0,))), draw.choice(SIZES)
    x, sizes = torch.randn(*leading, count, 4), torch.randint(-1, count + 2, leading)
    return {
        "similarity": (x @ x.mT).to(draw.choice(DTYPES)),
        "counts": torch.randint(-1, count + 2, leading),
        "most": draw.randint(0, count),
        "points": draw.choice((None, sizes)),
    }


def merge_rows(draw: Random) -> dict:
    dst, src, index = rows(draw)
    weights = draw.choice((None, torch.rand(dst.shape[:-1]) + 0.1)), draw.choice((None, torch.rand(src.shape[:-1])))
    return {"dst": dst, "src": src, "index": index, "dst_weight": weights[0], "src_weight": weights[1]}


def add_rows(draw: Random) -> dict:
    x, added, index = rows(draw)
    index = index if draw.random() < 0.6 else torch.randint(x.shape[-2], index.shape[-1:])
    return {"x": x, "index": index, "rows": added, "inplace": draw.random() < 0.5}


def gather_rows(draw: Random) -> dict:
    x, _, index = rows(draw)
    return {"x": x, "index": index, "dim": -2}


def gather_rms_norm(draw: Random) -> dict:
    x, _, index = rows(draw)
    return {"x": x, "index": index, "weight": torch.randn(x.shape[-1]).to(x.dtype), "eps": 1e-6}


def row_dots(draw: Random) -> dict:
    count, pairs = draw.choice(SIZES[1:]), draw.choice(SIZES)
    x = torch.randn(count, draw.choice(SIZES)).to(draw.choice(DTYPES))
    return {"x": x, "first": torch.randint(count, (pairs,)), "second": torch.randint(count, (pairs,))}


def grow_regions(draw: Random) -> dict:
    """Neighbours on a line, in two groups."""
    count = draw.choice(SIZES[1:])
    at = torch.arange(count)
    pairs = torch.stack([at[:-1], at[1:]])
    group = (at >= count // 2).long()
    bounded = draw.random() < 0.5
    return {
        "x": torch.randn(count, draw.choice(SIZES)).to(draw.choice(DTYPES)),
        "sizes": torch.rand(count) + 0.5,
        "pairs": pairs[:, group[pairs[0]] == group[pairs[1]]],
        "threshold": draw.choice((None, 0.0, 0.3)),
        "largest": draw.choice((None, 3)),
        "group": group if bounded else None,
        "spare": torch.tensor([count // 4, 1]) if bounded else None,
        "block": draw.choice((None, at // 2)),
    }


def swiglu(draw: Random) -> dict:
    x, _, _ = rows(draw)
    return {"gate": x, "up": torch.randn_like(x)}


def turning(draw: Random) -> dict:
    half, tokens, batch = draw.choice(SIZES[1:8]), draw.choice(SIZES), draw.choice((0, 1, 2))
    cut = sorted(draw.randint(0, half) for _ in range(2))
    sections = draw.choice((None, [cut[0], cut[1] - cut[0], half - cut[1]]))
    position = torch.rand(*(() if sections is None else (3,)), batch, tokens).double() * 2**20
    return {
        "position": position,
        "inv_freq": 1e6 ** -(torch.arange(half) / half),
        "attention_scaling": 1.0,
        "sections": sections,
        "interleaved": sections is not None and draw.random() < 0.5,
    }


def rotary_table(draw: Random) -> dict:
    return turning(draw) | {"dtype": draw.choice(DTYPES)}


def rotary(draw: Random) -> dict:
    arguments, dtype = turning(draw), draw.choice(DTYPES)
    shape, size = arguments["position"].shape[-2:], 2 * len(arguments["inv_freq"])
    q, k = (torch.randn(shape[0], heads, shape[1], size).to(dtype) for heads in (4, 2))
    return {"q": q, "k": k} | arguments


def apply_rotary(draw: Random) -> dict:
    arguments = rotary(draw)
    shape = arguments["q"].shape
    table = shape[2:] if draw.random() < 0.5 else (shape[0], *shape[2:])
    cos, sin = (torch.randn(table).to(draw.choice((arguments["q"].dtype, torch.float32))) for _ in range(2))
    return {"q": arguments["q"], "k": arguments["k"], "cos": cos, "sin": sin.to(cos.dtype)}


def decode_step(draw: Random) -> dict:
    """Of one layer, its weights and its cache as arguments of their own; `call` puts them together."""
    batch, groups, heads, entries = draw.choice((0, 1, 2, 5)), 2, draw.choice((2, 4)), draw.choice(SIZES)
    hidden, inner, size = 32, 48, 16
    of = {
        "input_norm": (hidden,),
        "q": (heads * size, hidden),
        "k": (groups * size, hidden),
        "o": (hidden, heads * size),
    }
    of |= {"v": (groups * size, hidden), "post_norm": (hidden,), "q_norm": (size,), "q_bias": (heads * size,)}
    of |= {
        "gate": (inner, hidden),
        "up": (inner, hidden),
        "down": (hidden, inner),
        "norm": (hidden,),
        "head": (19, hidden),
    }
    of |= {"hidden_states": (batch, hidden), "cos": (batch, size), "sin": (batch, size)}
    of |= {"keys": (batch, groups, entries + 3, size), "values": (batch, groups, entries + 3, size)}
    arguments = {name: torch.randn(shape) * 0.3 for name, shape in of.items()}
    starts = torch.tensor([draw.randint(-2, entries + 2) for _ in range(batch)], dtype=torch.int64)
    numbers = {"heads": heads, "groups": groups, "head_dim": size, "eps": 1e-6, "scale": 0.25, "end": entries}
    return arguments | numbers | {"starts": draw.choice((None, starts))}


def packed_decode_step(draw: Random) -> dict:
    """The same over a packed cache, with its segments' rows as arguments of their own."""
    arguments = decode_step(draw)
    batch, groups, entries, size = arguments["keys"].shape
    lengths = torch.randint(entries, (batch, groups))
    capacity = int(lengths.max()) + 3 if batch else 0
    rows = batch * groups * capacity + 1
    first = capacity * torch.randperm(batch * groups).view(batch, groups)
    keys, values = torch.randn(2, rows, size) * 0.3
    packed = {"keys": keys, "values": values, "first": first, "lengths": lengths, "rows": rows, "added": 1}
    packed["log_mass"] = draw.choice((None, torch.rand(rows)))
    return {name: x for name, x in arguments.items() if name not in LayerCache._fields} | packed


OPS = {
    make.__name__: make
    for make in (
        prompt_attention, prompt_attention_mass, prompt_attention_peak, column_mass, power_iterate, decode_attention,
        packed_prompt_attention, packed_decode_attention, best_match, k_centres, merge_rows, add_rows, gather_rows,
        gather_rms_norm, row_dots, grow_regions, swiglu, rotary_table, rotary, apply_rotary, decode_step,
        packed_decode_step, replay_attention, fit_masses, top_places,
    )
} | {"rotary_": rotary}  # fmt: skip


def call(op: str, arguments: dict, backend: str) -> list[Tensor]:
    """The op's results, and what it wrote into."""
    given = dict(arguments)
    if not op.endswith("decode_step"):
        found = getattr(mminfer_kernels, op)(**given, backend=backend)
        return [given["q"], given["k"]] if op == "rotary_" else list(found) if isinstance(found, tuple) else [found]
    layer = LayerWeights._make(given.pop(name, None) for name in LayerWeights._fields)
    if op == "packed_decode_step":
        segments = Segments(*(given.pop(name) for name in ("first", "lengths", "rows")))
        kept = {name: given.pop(name) for name in ("keys", "values", "added", "log_mass")}
        cache: LayerCache | PackedLayerCache = PackedLayerCache(**kept, segments=segments)
    else:
        cache = LayerCache._make(given.pop(name) for name in LayerCache._fields)
    run = {name: given.pop(name) for name in ("hidden_states", "cos", "sin")}
    weights = DecoderWeights((layer,), **given)
    return [mminfer_kernels.decode_step(**run, weights=weights, caches=[cache], backend=backend), *cache[:2]]


def spoiled_tensor(x: Tensor, draw: Random) -> object:
    """Something in the place of a tensor, most often a tensor in which one thing is wrong."""
    sizes, dim = list(x.shape), draw.randrange(max(x.dim(), 1))
    other = sizes.copy()
    if sizes:
        other[dim] = draw.choice((0, 1, sizes[dim] + 1, max(sizes[dim] - 1, 0), 2 * sizes[dim]))
    resized = torch.zeros(other, dtype=x.dtype)
    if x.is_floating_point():
        resized = torch.randn(other).to(x.dtype)
    ways = [
        lambda: x.to(draw.choice(STRANGE_DTYPES)),
        lambda: x.to("meta"),
        lambda: resized,
        lambda: x[None] if draw.random() < 0.5 or not sizes else x.select(dim, 0) if sizes[dim] else x,
        lambda: x.flatten(),
        lambda: x.mT.contiguous().mT if x.dim() > 1 else x.repeat_interleave(2)[::2],
        lambda: x.repeat_interleave(2, dim).narrow(dim, 0, sizes[dim]) if sizes else x,
        lambda: x.transpose(0, dim) if sizes else x,
        lambda: x.select(dim, 0).unsqueeze(dim).expand(sizes) if sizes and sizes[dim] else x,
        lambda: torch.zeros((), dtype=x.dtype).expand([2**31 + 5 if i == dim else 1 for i in range(len(sizes))]),
        lambda: x.as_strided(sizes, [1] * len(sizes)) if x.numel() else x,
        lambda: (
            torch.frombuffer(bytearray(x.numel() * x.element_size() + 1), dtype=x.dtype, offset=1).view(sizes)
            if x.numel()
            else x
        ),
        lambda: x.to_sparse() if x.is_floating_point() else x,
        lambda: torch.zeros(sizes, dtype=torch.complex64).conj().imag,
        lambda: x.detach().clone().fill_(draw.choice(filling)),
        lambda: x.clone().requires_grad_() if x.is_floating_point() else x,
        lambda: draw.choice(NUMBERS),
    ]
    filling = (math.nan, math.inf, 1e30, 0.0) if x.is_floating_point() else (-1, 2**40, -(2**63), 2**63 - 1)
    return draw.choice(ways)()


def spoiled(arguments: dict, draw: Random) -> dict:
    """Arguments of which up to three are wrong."""
    wrong = dict(arguments)
    for _ in range(draw.choice((0, 1, 1, 1, 2, 3))):
        name = draw.choice(list(wrong))
        try:
            value = wrong[name]
            if not isinstance(value, Tensor):
                wrong[name] = draw.choice(NUMBERS)
            elif value.numel() < MOST_ELEMENTS:
                wrong[name] = spoiled_tensor(value, draw)
        except (RuntimeError, NotImplementedError, IndexError):  # torch has no such tensor
            continue
    if draw.random() < 0.05:
        a, b = draw.choice(list(wrong)), draw.choice(list(wrong))
        wrong[a] = wrong[b]
    return wrong


def described(op: str, arguments: dict) -> str:
    def one(x: object) -> str:
        return (
            f"{x.dtype}{list(x.shape)} stride {x.stride()} {x.device}"
            if isinstance(x, Tensor) and not x.is_sparse
            else repr(x)
        )

    return f"{op}({', '.join(f'{name}={one(x)}' for name, x in arguments.items())})"


def outcome(op: str, arguments: dict, backend: str) -> list[Tensor] | Exception:
    """What the op gave, or its typed refusal; anything else that it raises is raised."""
    try:
        return call(op, arguments, backend)
    except REFUSALS as error:
        return error


def is_finite(arguments: dict) -> bool:
    tensors = [x for x in arguments.values() if isinstance(x, Tensor)]
    if any(x.is_sparse or x.is_meta or x.numel() > MOST_ELEMENTS for x in tensors):
        return False
    return all(bool((x.abs() < 1e5).all()) for x in tensors if x.dtype in (*DTYPES, torch.float64))


def copied(arguments: dict) -> dict:
    """Tensors of their own, in the same layout; those that overlap are left for the op to refuse."""
    return {
        name: x.detach().clone() if isinstance(x, Tensor) and not x.is_sparse and x.numel() < MOST_ELEMENTS else x
        for name, x in arguments.items()
    }


def check_call(op: str, arguments: dict, counts: collections.Counter) -> None:
    """One call natively; where it is not refused, the reference must give the same."""
    before = copied(arguments)
    sound = is_finite(arguments)
    backend = "reference" if op == "gather_rows" else "native"
    found = outcome(op, arguments, backend)
    counts["refused" if isinstance(found, Exception) else "answered"] += 1
    if isinstance(found, BackendError) or op == "gather_rows":
        return
    wanted = outcome(op, arguments if isinstance(found, Exception) else copied(before), "reference")
    if isinstance(found, Exception):
        assert type(wanted) is type(found), f"native: {found!r}, the reference: {wanted!r}"
        return
    assert not isinstance(wanted, Exception), f"native answers, the reference: {wanted!r}"
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
        if sound and ours.is_floating_point() and op != "best_match":
            check_near(ours, theirs, op, before)


def check_near(ours: Tensor, theirs: Tensor, op: str, arguments: dict) -> None:
    """Raises `AssertionError` if a result is off the reference's by more than rounding gives.

    A row that many others are added to is rounded at every one natively, and at the end by the reference.
    """
    tolerance = 1e-3 if ours.dtype == torch.float32 else 0.1
    if op == "add_rows" and ours.dtype in (torch.bfloat16, torch.float16) and ours.numel():
        additions = arguments["index"].shape[-1]
        tolerance += math.sqrt(additions) * torch.finfo(ours.dtype).eps * float(theirs.abs().max())
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance, equal_nan=True)


def limit_memory() -> None:
    """A call that asks for all there is fails by itself, before the system ends some other process."""
    try:
        import resource
    except ImportError:  # Windows
        return
    if not SANITIZED:  # whose shadow is a large part of all addresses
        most = resource.getrlimit(resource.RLIMIT_AS)[1]
        soft = MOST_BYTES if most == resource.RLIM_INFINITY else min(MOST_BYTES, most)
        resource.setrlimit(resource.RLIMIT_AS, (soft, most))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--examples", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ops", nargs="*", default=list(OPS))
    parser.add_argument("--log", type=Path, default=Path("/dev/null"))
    arguments = parser.parse_args()
    if SANITIZED:  # whole programs under a sanitizer compile slowly when optimised
        build.FLAGS = tuple("-O0" if flag == "-O3" else flag for flag in build.FLAGS)
    counts: collections.Counter[str] = collections.Counter()

    @seed(arguments.seed)
    @settings(max_examples=arguments.examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.sampled_from(arguments.ops), st.integers(0, 2**32), st.booleans())
    def every_call(op: str, drawn: int, hostile: bool) -> None:
        draw = Random(drawn)
        torch.manual_seed(drawn)
        values = OPS[op](draw)
        values = spoiled(values, draw) if hostile else values
        arguments.log.write_text(f"seed {drawn}: {described(op, values)}\n", "utf-8")
        counts[op] += 1
        check_call(op, values, counts)

    limit_memory()
    every_call()
    print(f"{counts.pop('answered', 0)} calls answered, {counts.pop('refused', 0)} refused, of {len(counts)} ops")


if __name__ == "__main__":
    main()
