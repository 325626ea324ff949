"""Every op beside what torch has for it, at the sizes of a model of 7 billion weights, by the device's own clock.

    python -m benchmarks.gpu.ops --out DIR

First comes what the card can do at most: a product of two square matrices, and a copy. `of_torch` is an op's time over
that of torch's fastest run for the same, or of attention alone for scores that come beside it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import mminfer_kernels as ops
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import normalize, rms_norm, scaled_dot_product_attention, silu

from benchmarks.gpu.clock import busy
from benchmarks.gpu.writing import Rows, in_words, part_parser

COLUMNS = ("op", "size", "dtype", "run", "ms", "first_ms", "tflops", "tb_a_s", "of_torch", "error")
HEADS, GROUPS, SIZE, HIDDEN, FFN = 28, 4, 128, 3584, 18_944
PROMPTS = (6_373, 31_461)
CACHE, BATCHES = 32_768, (1, 8, 32)
SHARE = 5  # of a cache's entries one in so many stays, in heads of different lengths
PLAIN = "torch"

Run = Callable[[], Any]


@dataclass
class Measured:
    """Runs of one op on inputs of one size.

    Args:
        op: its name.
        size: in words.
        flops: of one run.
        moved: bytes that one must move, at least.
        runs: ours by name.
        plain: torch's by name, to compare ours with.
    """

    op: str
    size: str
    flops: int
    moved: int
    runs: dict[str, Run]
    plain: dict[str, Run] = field(default_factory=dict)


def ceilings(like: Tensor, tiny: bool) -> Iterator[Measured]:
    """What the device can do at most."""
    n, count = (256, 2**16) if tiny else (8192, 2**31)
    a = torch.randn(n, n, device=like.device, dtype=like.dtype)
    source = torch.empty(count, dtype=torch.uint8, device=like.device)
    yield Measured("product", f"{n:,} x {n:,}", 2 * n**3, 3 * a.nbytes, {}, {PLAIN: lambda: a @ a})
    yield Measured("copy", f"{count >> 20:,} MiB", 0, 2 * count, {}, {PLAIN: source.clone})


def prompts(like: Tensor, tiny: bool) -> Iterator[Measured]:
    """Attention of a prompt, alone and with scores; beside it torch's, each of its kernels by itself."""
    for tokens in (96,) if tiny else PROMPTS:
        q, k, v = (_normal(like, 1, h, tokens, SIZE) for h in (HEADS, GROUPS, GROUPS))
        size, flops = f"{tokens:,} tokens", 2 * HEADS * SIZE * tokens * (tokens + 1)
        moved = 2 * q.nbytes + k.nbytes + v.nbytes
        alone: dict[str, Run] = {f"torch, {name}": run for name, run in _kernels_of_torch(q, k, v, like.device.type)}
        eighth = torch.arange(tokens - 1, -1, -8, device=like.device).flip(0)
        some, half = q[:, :, eighth].contiguous(), tokens // 2
        scores = {
            "prompt_attention_mass": lambda q=q, k=k, v=v: ops.prompt_attention_mass(q, k, v),
            "column_mass": lambda q=q, k=k: ops.column_mass(q, k),
            "column_mass, 1 query in 8": lambda q=some, k=k, at=eighth: ops.column_mass(q, k, query_index=at),
            "power_iterate, 5": lambda q=q, k=k: ops.power_iterate(q, k, 5),
            "prompt_attention_peak, second half": lambda q=q, k=k, v=v, n=half: ops.prompt_attention_peak(
                q[:, :, n:], k, v, counted=n
            ),
        }
        ours: Run = lambda q=q, k=k, v=v: ops.prompt_attention(q, k, v)  # noqa: E731
        yield Measured("prompt_attention", size, flops, moved, {"ours": ours}, alone)
        for name, run in scores.items():
            yield Measured(name, size, 0, 0, {"ours": run}, alone)


def steps(like: Tensor, tiny: bool) -> Iterator[Measured]:
    """Attention of a decoding step over a whole cache, and over one whose heads differ in length."""
    entries = 64 if tiny else CACHE
    for batch in (1, 2) if tiny else BATCHES:
        q, k, v = (_normal(like, batch, h, n, SIZE) for h, n in ((HEADS, 1), (GROUPS, entries), (GROUPS, entries)))
        plain = {PLAIN: lambda q=q, k=k, v=v: scaled_dot_product_attention(q, k, v, enable_gqa=True)}
        runs: dict[str, Run] = {"ours": lambda q=q, k=k, v=v: ops.decode_attention(q, k, v)}
        size = f"batch {batch}, {entries:,} entries"
        yield Measured("decode_attention", size, 4 * q.numel() * entries, k.nbytes + v.nbytes, runs, plain)
        lengths = torch.tensor([[1, 2, 3, 4]] * batch, device=like.device) * (2 * entries // SHARE // 5)
        first = (lengths.flatten().cumsum(0) - lengths.flatten()).view_as(lengths)
        held = int(lengths.sum())
        keys, values, mass = _normal(like, held, SIZE), _normal(like, held, SIZE), torch.zeros(held, device=q.device)
        packed: dict[str, Run] = {
            "ours": lambda q=q, k=keys, v=values, f=first, n=lengths, m=mass: ops.packed_decode_attention(
                q, k, v, f, n, log_mass=m
            )
        }
        told = f"batch {batch}, {held // (batch * GROUPS):,} entries a head"
        yield Measured("packed_decode_attention", told, 0, keys.nbytes + values.nbytes + mass.nbytes, packed, plain)


def rows(like: Tensor, tiny: bool) -> Iterator[Measured]:
    """What moves rows: merging, gathering, norms."""
    pictures, tokens, columns, inner = (2, 16, 64, 96) if tiny else (32, 196, HIDDEN, FFN)
    total = pictures * tokens
    src, dst = (_normal(like, pictures, tokens // 2, columns) for _ in range(2))
    index = torch.randint(tokens // 2, (pictures, tokens // 2), device=like.device)
    hidden, weight, gate = _normal(like, total, columns), _normal(like, columns), _normal(like, total, 2 * inner)
    some = torch.arange(0, total, 2, device=like.device)

    def match() -> Any:
        return (normalize(src, dim=-1) @ normalize(dst, dim=-1).mT).max(-1)

    def merge() -> Tensor:
        wide = index[..., None].expand_as(src)
        counts = dst.new_ones(index.shape).scatter_add_(1, index, dst.new_ones(index.shape))
        return dst.scatter_add(1, wide, src) / counts[..., None]

    size, read = f"{pictures} x {tokens} x {columns}", src.nbytes + dst.nbytes
    flops = 2 * pictures * (tokens // 2) ** 2 * columns
    half, (up, down) = some.numel() * columns * like.element_size(), gate.chunk(2, -1)
    table = [
        ("best_match", size, flops, read, lambda: ops.best_match(src, dst), match),
        ("merge_rows", size, 0, read + dst.nbytes, lambda: ops.merge_rows(dst, src, index), merge),
        ("gather_rows", "every other", 0, 2 * half, lambda: ops.gather_rows(hidden, some), lambda: hidden[some]),
        ("gather_rms_norm", "every other", 0, 2 * half, lambda: ops.gather_rms_norm(hidden, some, weight, 1e-6),
         lambda: rms_norm(hidden[some], (columns,), weight, 1e-6)),
        ("swiglu", f"{total:,} x {inner:,}", 0, 3 * up.nbytes, lambda: ops.swiglu(up, down), lambda: silu(up) * down),
    ]  # fmt: skip
    for op, told, work, moved, ours, plain in table:
        yield Measured(op, told, work, moved, {"ours": ours}, {PLAIN: plain})


def _normal(like: Tensor, *shape: int) -> Tensor:
    return torch.randn(shape, device=like.device, dtype=like.dtype)


def _kernels_of_torch(q: Tensor, k: Tensor, v: Tensor, device: str) -> Iterator[tuple[str, Run]]:
    def with_backend(backend: SDPBackend) -> Run:
        def run() -> Tensor:
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

        return run

    chosen = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION) if device == "cuda" else (SDPBackend.MATH,)
    for backend in chosen:
        yield backend.name.lower(), with_backend(backend)


def measure(found: Measured, dtype: torch.dtype, device: str, repeats: int) -> Iterator[dict[str, Any]]:
    """One row a run, torch's first."""
    fastest: float | None = None
    for name, run in {**found.plain, **found.runs}.items():
        row: dict[str, Any] = {"op": found.op, "size": found.size, "dtype": str(dtype)[6:], "run": name}
        try:
            timing = busy(run, device, repeats)
        except Exception as error:  # a kernel that does not take this leaves the others to be measured
            yield row | {"error": in_words(error)}
            continue
        row |= timing.columns
        if found.flops:
            row["tflops"] = round(found.flops / timing.ms / 1e9, 2)
        if found.moved:
            row["tb_a_s"] = round(found.moved / timing.ms / 1e9, 3)
        if name in found.plain:
            fastest = timing.ms if fastest is None else min(fastest, timing.ms)
        elif fastest is not None:
            row["of_torch"] = round(timing.ms / fastest, 3)
        yield row


def main() -> None:
    parser = part_parser(__doc__, seconds=120)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.manual_seed(0)
    dtype = torch.float32 if args.device == "cpu" else torch.bfloat16
    like = torch.empty(0, device=args.device, dtype=dtype)
    out, until = Rows(args.out / "ops.csv", COLUMNS, args.device), time.monotonic() + args.seconds
    for part in (ceilings, prompts, steps, rows):
        for found in part(like, args.tiny):
            if time.monotonic() > until:
                return
            for row in measure(found, dtype, args.device, args.repeats):
                out.add(row)


if __name__ == "__main__":
    main()
