"""Where the commands print, how they refuse a request, and the files they write."""

from __future__ import annotations

import csv
import functools
import io
import json
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
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
            _tell(error)
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            with suppress(OSError):
                ERR.print("stopped")
            raise typer.Exit(130) from None

    return run


def _tell(error: MminferError) -> None:
    with suppress(OSError):  # where nobody can be told the exit code has to do
        ERR.print(f"[bold red]{type(error).__name__}:[/] ", end="")
        ERR.print(str(error), markup=False, highlight=False)


def exit_code(run: Callable[[], None]) -> int:
    """Runs a command line on any console: what it cannot show is escaped, and what cannot be written ends with code 2.

    Nobody reads on behind a closed pipe: that ends with code 1, without a word.
    """
    if sys.stdout is None:
        _tell(InputError("the standard output is closed, so nothing could be printed: pass /dev/null if that is meant"))
        return 2
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    code, failed = 0, None
    try:
        run()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except OSError as error:
        failed = error
    if failed is not None and failed.filename is not None:
        raise failed  # of a file, not of the console
    lost = _lost(sys.stdout)
    if _lost(sys.stderr) is None:
        lost = lost or failed
    if isinstance(lost, BrokenPipeError):
        return 1
    if lost is not None:
        _tell(InputError(f"the standard output could not be written ({lost.strerror}): pass one that can"))
    return code if lost is None and failed is None else 2


def _lost(stream: Any) -> OSError | None:
    """Why what was printed cannot be written; the stream then goes nowhere, so that the process can end."""
    try:
        if stream is not None:
            stream.flush()
    except OSError as error:
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return error
    return None


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
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0], lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    except OSError as error:
        raise InputError(f"--csv {path!s:.200}: {error}") from error
