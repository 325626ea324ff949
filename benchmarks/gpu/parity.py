"""Whether every kernel gives what its reference gives on float64: each op, type and size, and very long prompts.

    python -m benchmarks.gpu.parity --out DIR

A result is right if its error is at most twice that of the reference in the same type and the rounding of the result.
Of prompts too long for a reference some queries are computed one by one.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from mminfer_kernels import decode_attention, packed_decode_attention, prompt_attention, prompt_attention_peak
from torch import Tensor

from benchmarks.gpu.writing import Rows, in_words, part_parser
from benchmarks.kernels.call import Call
from benchmarks.kernels.cases import CASES

COLUMNS = ("op", "size", "dtype", "backend", "error", "error_of_reference", "status", "s")
TYPES = (torch.bfloat16, torch.float16, torch.float32)
BACKENDS = ("native", "triton")
STEPS = 4  # of the type's eps, by which a result may be rounded
LONG = (16_384, 65_536, 131_072)
HEADS, GROUPS = 28, 4
SAMPLED = 16  # queries of a long prompt

Results = list[Tensor]


def compared(found: Results, reference: Results, truth: Results) -> dict[str, Any]:
    """Norms of errors over norms of what is true, the largest of all results, and what is to be said of them."""
    errors, bars, status = [0.0], [0.0], "right"
    for ours, theirs, exact in zip(found, reference, truth, strict=True):
        if not ours.is_floating_point():
            if not torch.equal(ours, exact):
                differing = int((ours != exact).sum())
                status = f"{differing:,} of {ours.numel():,} places differ"  # of two that are about as good
            continue
        size = exact.norm().clamp_min(1e-30)
        errors.append(float((ours.double() - exact).norm() / size))
        bars.append(float((theirs.double() - exact).norm() / size))
        if not errors[-1] <= 2 * bars[-1] + STEPS * torch.finfo(ours.dtype).eps:  # nan is wrong
            status = "wrong"
    return {"error": f"{max(errors):.2e}", "error_of_reference": f"{max(bars):.2e}", "status": status}


def of_call(call: Call, backend: str) -> dict[str, Any]:
    """One backend's result beside the reference's."""
    why_not = call.why_not(backend)
    if why_not:
        return {"status": why_not}
    double = call.in_double()
    return compared(
        call.results(call.run(backend)), call.results(call.run("reference")), double.results(double.run("reference"))
    )


def every_case(device: str, tiny: bool) -> Iterator[tuple[dict[str, Any], Callable[[], dict[str, Any]]]]:
    """All ops at the sizes for trying, then at those for measuring, in every type."""
    for quick, dtype, case in itertools.product((True,) if tiny else (True, False), TYPES, CASES):
        if device == "cpu" and dtype != torch.float32:
            continue
        for backend in BACKENDS:
            told = {"op": case.op, "size": case.name(quick).removeprefix(f"{case.op}, "), "dtype": str(dtype)[6:]}

            def run(case: Any = case, quick: bool = quick, dtype: torch.dtype = dtype, name: str = backend) -> Any:
                return of_call(case.build(quick, device, dtype), name)

            yield told | {"backend": backend}, run


def long_prompts(device: str, tiny: bool) -> Iterator[tuple[dict[str, Any], Callable[[], dict[str, Any]]]]:
    """Attention of prompts that no reference takes in one piece."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    for tokens in (320,) if tiny else LONG:
        for op, check in LONG_CHECKS.items():
            told = {"op": op, "size": f"{tokens:,} tokens", "dtype": str(dtype)[6:], "backend": "auto"}
            yield told, lambda check=check, tokens=tokens: check(device, dtype, tokens)


def _drawn(device: str, dtype: torch.dtype, queries: int, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    q, k, v = (
        torch.randn(1, h, n, 128, device=device, dtype=dtype, generator=generator)
        for h, n in ((HEADS, queries), (GROUPS, tokens), (GROUPS, tokens))
    )
    return q, k, v


def _attended(q: Tensor, k: Tensor, v: Tensor, place: int) -> tuple[Tensor, Tensor]:
    """What the query at a place reads, [H, D], and the shares it gives, [H, place + 1]."""
    keys, values = (x[0, :, : place + 1].repeat_interleave(q.shape[1] // k.shape[1], 0) for x in (k, v))
    shares = ((keys @ q[0, :, place, :, None])[..., 0] * q.shape[3] ** -0.5).softmax(-1)
    return (shares[:, None] @ values)[:, 0], shares


def _whole_prompt(device: str, dtype: torch.dtype, tokens: int) -> dict[str, Any]:
    q, k, v = _drawn(device, dtype, tokens, tokens)
    places = torch.linspace(0, tokens - 1, SAMPLED).long().tolist()
    found = prompt_attention(q, k, v)[0, :, places]
    reference = torch.stack([_attended(q, k, v, place)[0] for place in places], 1)
    exact = torch.stack([_attended(q.double(), k.double(), v.double(), place)[0] for place in places], 1)
    return compared([found], [reference], [exact])


def _peaks(device: str, dtype: torch.dtype, tokens: int) -> dict[str, Any]:
    """Of a few queries behind all keys: the largest share that each key is given."""
    _, k, v = _drawn(device, dtype, 1, tokens)
    q = _drawn(device, dtype, SAMPLED, 1)[0]
    _, found = prompt_attention_peak(q, k, v, counted=tokens - SAMPLED)

    def peak(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        padded = torch.cat([q.new_zeros(1, HEADS, tokens - SAMPLED, 128), q], 2)
        shares = [_attended(padded, k, v, place)[1][:, : tokens - SAMPLED] for place in range(tokens - SAMPLED, tokens)]
        return torch.stack(shares).unflatten(1, (GROUPS, -1)).amax((0, 2))[None]

    return compared([found], [peak(q, k, v).float()], [peak(q.double(), k.double(), v.double())])


def _step(device: str, dtype: torch.dtype, tokens: int) -> dict[str, Any]:
    """A decoding step, over heads that are alike and over heads of different lengths."""
    q, k, v = _drawn(device, dtype, 1, tokens)
    lengths = torch.tensor([[tokens // 2, tokens, tokens // 5, 7]], device=device)
    first = torch.arange(GROUPS, device=device)[None] * tokens
    rows = [x[0].flatten(0, 1) for x in (k, v)]
    found = [decode_attention(q, k, v), packed_decode_attention(q, *rows, first, lengths)]

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Results:
        wide = q.expand(-1, -1, tokens, -1)
        heads = [
            _attended(wide[:, g * 7 : g * 7 + 7], k[:, g : g + 1], v[:, g : g + 1], int(length) - 1)[0]
            for g, length in enumerate(lengths[0].tolist())
        ]
        return [_attended(wide, k, v, tokens - 1)[0][None, :, None], torch.cat(heads)[None, :, None]]

    return compared(found, plain(q, k, v), plain(q.double(), k.double(), v.double()))


LONG_CHECKS = {"prompt_attention": _whole_prompt, "prompt_attention_peak": _peaks, "decode_attention": _step}


def main() -> None:
    args = part_parser(__doc__, seconds=120).parse_args()
    torch.manual_seed(0)
    rows, until = Rows(args.out / "parity.csv", COLUMNS, args.device), time.monotonic() + args.seconds
    for told, run in itertools.chain(long_prompts(args.device, args.tiny), every_case(args.device, args.tiny)):
        if time.monotonic() > until:
            break
        start = time.monotonic()
        try:
            found = run()
        except Exception as error:  # one that fails leaves the others to be looked at
            found = {"status": in_words(error)}
        rows.add({**told, **found, "s": round(time.monotonic() - start, 2)})


if __name__ == "__main__":
    main()
