"""The tables that the command line prints."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from mminfer.metrics.memory import show_bytes
from mminfer.metrics.stats import GenerationStats


def stats_table(stats: GenerationStats) -> Table:
    """One answer's figures beside those of the uncompressed model."""
    table = Table(title="what the answer took", title_justify="left")
    for column, justify in (("", "left"), ("this run", "right"), ("full model", "right"), ("kept", "right")):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    full = stats.prompt_tokens
    table.add_row("prompt tokens", f"{full:,}", f"{full:,}", "")
    table.add_row("  visual", f"{stats.visual_tokens:,}", f"{stats.visual_tokens:,}", "")
    table.add_row("tokens after merging", f"{stats.merged_tokens:,}", f"{full:,}", _share(stats.merged_tokens, full))
    table.add_row(
        "rows per layer",
        _runs(stats.layer_rows),
        f"{full:,}",
        _share(sum(stats.layer_rows), full * len(stats.layer_rows)),
    )
    table.add_row("cache entries per layer", _runs(stats.layer_entries), "", "")
    table.add_row(
        "cache",
        show_bytes(stats.cache_bytes),
        show_bytes(stats.full_cache_bytes),
        _share(stats.cache_bytes, stats.full_cache_bytes),
    )
    table.add_row("  as allocated", show_bytes(stats.allocated_bytes), "", "")
    table.add_row(
        "prompt FLOPs (language model)",
        _flops(stats.prompt_flops),
        _flops(stats.full_prompt_flops),
        _share(stats.prompt_flops, stats.full_prompt_flops),
    )
    vision = (_flops(stats.vision_flops),) * 2 if stats.vision_flops else ("-", "-")
    table.add_row("vision tower FLOPs", *vision, "")
    table.add_row("time to first token", f"{stats.ttft_ms:.1f} ms", "", "")
    table.add_row("  prompt pass", f"{stats.prompt_ms:.1f} ms", "", "")
    tpot = "-" if stats.tpot_ms is None else f"{stats.tpot_ms:.2f} ms"
    table.add_row("time per token", tpot, "", "")
    table.add_row("peak memory", show_bytes(stats.peak_bytes), "", "")
    table.add_row("backends", _backends(stats.backends), "", "")
    return table


def comparison_table(compressed: GenerationStats, full: GenerationStats, kl: float) -> Table:
    """Two measured runs of the same request, side by side."""
    table = Table(title="compressed beside uncompressed, both measured", title_justify="left")
    for column, justify in (
        ("", "left"),
        ("compressed", "right"),
        ("uncompressed", "right"),
        ("ratio", "right"),
    ):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    rows: list[tuple[str, float, float, str]] = [
        ("prompt FLOPs (language model)", compressed.prompt_flops, full.prompt_flops, "flops"),
        ("vision tower FLOPs", compressed.vision_flops, full.vision_flops, "flops"),
        ("cache", compressed.cache_bytes, full.cache_bytes, "bytes"),
        ("prompt pass", compressed.prompt_ms, full.prompt_ms, "ms"),
        ("time to first token", compressed.ttft_ms, full.ttft_ms, "ms"),
    ]
    if compressed.tpot_ms and full.tpot_ms:
        rows.append(("time per token", compressed.tpot_ms, full.tpot_ms, "ms"))
    for name, a, b, unit in rows:
        show = {"flops": _flops, "bytes": show_bytes, "ms": lambda x: f"{x:.2f} ms"}[unit]
        table.add_row(name, show(a), show(b), f"{a / b:.2f}" if b else "-")
    table.add_row("KL divergence of the first token", f"{kl:.2e} nats", "", "")
    return table


def _share(part: float, whole: float) -> str:
    return f"{100 * part / max(whole, 1):.1f} %"


def _runs(values: Sequence[int]) -> str:
    """Equal neighbours told once: 3 x 576, 2 x 100."""
    runs: list[list[int]] = []
    for value in values:
        if runs and runs[-1][1] == value:
            runs[-1][0] += 1
        else:
            runs.append([1, value])
    return ", ".join(f"{value:,}" if count == 1 else f"{count} x {value:,}" for count, value in runs)


def _flops(count: float) -> str:
    for unit in ("", "k", "M", "G"):
        if count < 1000:
            return f"{count:.1f} {unit}FLOP"
        count /= 1000
    return f"{count:.2f} TFLOP"


def _backends(backends: dict[str, str]) -> str:
    by_backend: dict[str, list[str]] = {}
    for op, backend in sorted(backends.items()):
        by_backend.setdefault(backend, []).append(op)
    return "; ".join(f"{backend}: {', '.join(ops)}" for backend, ops in by_backend.items()) or "-"
