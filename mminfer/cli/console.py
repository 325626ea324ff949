"""Where the commands print, how they refuse a request, and the files they write."""

from __future__ import annotations

import csv
import functools
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import typer
from rich.console import Console

from mminfer.errors import InputError, MminferError

OUT, ERR = Console(), Console(stderr=True)


def reports_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Ends a command with a message and exit code 2 if the request is wrong, with 130 on Ctrl-C; never a traceback."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except MminferError as error:
            ERR.print(f"[bold red]{type(error).__name__}:[/] ", end="")
            ERR.print(str(error), markup=False, highlight=False)
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            ERR.print("stopped")
            raise typer.Exit(130) from None

    return run


def print_json(report: dict[str, Any]) -> None:
    """Prints one object on one line, which no width of a terminal breaks."""
    sys.stdout.write(json.dumps(report) + "\n")


def check_writable(path: Path | None, option: str) -> None:
    """Raises `InputError` if a file could not be made there, before any work is done for it."""
    if path is None:
        return
    if not path.absolute().parent.is_dir():
        raise InputError(f"{option} {path}: there is no folder {path.parent}: make it first")
    if path.is_dir() or not os.access(path if path.exists() else path.absolute().parent, os.W_OK):
        raise InputError(f"{option} {path}: no file can be written there: pass the name of one that can")


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Writes rows that have the same columns.

    Raises:
        InputError: the file cannot be written.
    """
    try:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0], lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    except OSError as error:
        raise InputError(f"--csv {path}: {error}") from error
