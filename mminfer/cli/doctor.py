"""The command line: mminfer doctor."""

from __future__ import annotations

import platform
import time
from typing import Annotated

import typer
from rich.table import Table

from mminfer.cli.console import ERR, OUT, reports_errors


@reports_errors
def doctor(
    build: Annotated[
        bool, typer.Option("--build", help="Build the native CPU kernels now, so that no answer waits for that.")
    ] = False,
) -> None:
    """Show what this machine has, which backend each op takes, and which families and presets there are."""
    from mminfer.forward.native_build import check_native_isa

    check_native_isa()
    if build:
        _build_kernels()
        return
    OUT.print(_machine_table())
    OUT.print(_ops_table())
    OUT.print(_presets_table())


def _build_kernels() -> None:
    """Builds the C++ library, or says why there is none and ends with exit code 1."""
    from mminfer_kernels import build

    from mminfer.forward.native_build import prepare_kernels

    pending, start = build.is_pending(), time.perf_counter()
    prepare_kernels("cpu")
    if build.library() is None:
        ERR.print(build.status(), markup=False, highlight=False)
        raise typer.Exit(1)
    done = f"built in {time.perf_counter() - start:.1f} s" if pending else "built before"
    OUT.print(f"native kernels: {done} ({build.status()})", markup=False, highlight=False, soft_wrap=True)


def _machine_table() -> Table:
    import torch
    import transformers
    from mminfer_kernels import status

    from mminfer.models.registry import supported_families

    table = Table(title="mminfer doctor", title_justify="left", show_header=False)
    rows = {
        "python": platform.python_version(),
        "torch": f"{torch.__version__}, {torch.get_num_threads()} threads",
        "transformers": transformers.__version__,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "triton": status.triton_status(),
        "native kernels": _native_status(),
        "families": ", ".join(supported_families()),
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _native_status() -> str:
    from mminfer_kernels import build

    way_out = "; the first answer builds it, or 'mminfer doctor --build' does now" if build.is_pending() else ""
    return build.status() + way_out


def _ops_table() -> Table:
    import mminfer_kernels
    from mminfer_kernels import status

    table = Table(title="what each op runs with", title_justify="left")
    for column in ("op", "device", "backend", "why"):
        table.add_column(column)
    for op in mminfer_kernels.OPS:
        for choice in status.choices(op):
            table.add_row(*choice)
    return table


def _presets_table() -> Table:
    """The presets, and what each was measured to keep."""
    from mminfer.config import PRESETS
    from mminfer.measured import MODEL, NOT_MEASURED, measured_presets

    table = Table(title=f"presets, and the right answers that {MODEL} reading pages kept", title_justify="left")
    table.add_column("preset", no_wrap=True)
    for column in ("techniques", "kept"):
        table.add_column(column)
    for name, config in PRESETS.items():
        row = measured_presets().get(name)
        told = "" if not config.techniques else NOT_MEASURED if row is None else row.told()
        techniques = ", ".join(type(technique).__name__ for technique in config.techniques)
        table.add_row(name, techniques, told, style="yellow" if row is not None and row.fails else None)
    return table
