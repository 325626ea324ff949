"""The tables that `mminfer bench` prints."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from mminfer.bench.fidelity import FidelityRow
from mminfer.bench.speed import SpeedRow

MIB = 2**20


def speed_tables(rows: Sequence[SpeedRow]) -> list[Table]:
    """Times, what they are of the host's, and memory; nothing of no rows."""
    return [_times(rows), _ratios(rows), _memory(rows)] if rows else []


def _times(rows: Sequence[SpeedRow]) -> Table:
    first = rows[0]
    chats = f"{first.batch} chats, " if first.batch > 1 else ""
    title = f"{chats}{first.prompt_tokens:,} tokens of prompt, {first.new_tokens} new, {first.repeats} calls"
    table = _table(title, "setting", "processor", "vision", "prompt pass", "TTFT", "TPOT", "tokens/s")
    for row in rows:
        stages = [_span(row, stage) for stage in ("prepare_ms", "vision_ms", "prompt_ms", "ttft_ms", "tpot_ms")]
        table.add_row(row.setting, *stages, f"{row.tokens_per_s:,.1f}")
    table.caption = "milliseconds: the median, and below it the 20th and 80th percentile"
    return table


def _ratios(rows: Sequence[SpeedRow]) -> Table:
    """How many times the host takes, does or holds."""
    title = "times less than the unpatched host"
    table = _table(title, "setting", "prompt FLOPs", "prompt pass", "TTFT", "TPOT", "cache")
    host = rows[0]
    for row in rows:
        ratios = (
            host.prompt_gflop / row.prompt_gflop,
            row.prompt_speedup,
            row.ttft_speedup,
            row.tpot_speedup,
            host.cache_bytes / row.cache_bytes,
        )
        table.add_row(row.setting, *(f"{ratio:.2f}" for ratio in ratios))
    return table


def _memory(rows: Sequence[SpeedRow]) -> Table:
    table = _table("work and memory", "setting", "prompt GFLOP", "cache MiB", "peak MiB", "steady MiB")
    for row in rows:
        sizes = (f"{row.cache_bytes / MIB:,.2f}", f"{row.peak_bytes / MIB:,.0f}", f"{row.steady_bytes / MIB:,.0f}")
        table.add_row(row.setting, f"{row.prompt_gflop:,.1f}", *sizes)
    table.caption = "work of the language model alone; memory of the whole process, weights included"
    return table


def fidelity_tables(rows: Sequence[FidelityRow]) -> list[Table]:
    """One table a protocol: figures of different protocols are not to be compared."""
    tables = []
    for protocol in dict.fromkeys(row.protocol for row in rows):
        own = [row for row in rows if row.protocol == protocol]
        title = f"fidelity, {protocol}, {own[0].positions} predictions"
        table = _table(title, "setting", "KL, nats", "same token", "cache kept", "prompt FLOPs kept")
        for row in own:
            shares = (f"{value:.1f} %" for value in (row.top1, row.cache_kept, row.flops_kept))
            table.add_row(row.setting, f"{row.kl:.4f}", *shares)
        tables.append(table)
    return tables


def _span(row: SpeedRow, stage: str) -> str:
    low, middle, high = (row.times[f"{stage}_{label}"] for label in ("p20", "p50", "p80"))
    digits = 2 if middle < 10 else 1 if middle < 100 else 0
    return f"{middle:,.{digits}f}\n{low:,.{digits}f}-{high:,.{digits}f}"


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0))
    table.caption_justify = "left"
    for column in columns:
        table.add_column(column, justify="left" if column == "setting" else "right", overflow="fold")
    return table
