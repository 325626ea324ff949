"""What the commands share: where they print, how they refuse, settings by name or from a file, rows to a file."""

from __future__ import annotations

import csv
import dataclasses
import functools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console

from mminfer.errors import InputError, MminferError

if TYPE_CHECKING:
    from mminfer.config import InferenceConfig

OUT, ERR = Console(), Console(stderr=True)
RESERVED = {"host", "blind"}  # names of rows that are no setting


def told_plainly(command: Callable[..., None]) -> Callable[..., None]:
    """A wrong request ends with its message and exit code 2, Ctrl-C with 130, neither with a traceback."""

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


def read_config(path: Path) -> InferenceConfig:
    """The settings in a file that `InferenceConfig.to_json()` wrote.

    Raises:
        InputError: the file cannot be read.
        ConfigError: it holds no settings.
    """
    from mminfer.config import InferenceConfig

    try:
        return InferenceConfig.from_json(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--config {path}: {error}") from error


def read_delta(text: str) -> float | str:
    """A V2PE step such as "1/16", "0.0625" or "auto".

    Raises:
        InputError: it is none.
    """
    if text == "auto":
        return text
    above, _, below = text.partition("/")
    try:
        return float(above) / float(below or 1)
    except (ValueError, ZeroDivisionError) as error:
        raise InputError(f"--delta {text}: wanted a number such as 1/16 or 0.0625, or auto") from error


def read_settings(
    presets: Sequence[str], configs: Sequence[Path], deltas: Sequence[str] = ()
) -> dict[str, InferenceConfig]:
    """Every preset and file, as it is or with every V2PE step, by name.

    Raises:
        InputError: a file cannot be read, a step is none, or a setting comes twice.
        ConfigError: there is no such preset, or a file holds no settings.
    """
    from mminfer.config import InferenceConfig
    from mminfer.positions.v2pe import V2PE

    named = [(name, InferenceConfig.from_preset(name)) for name in presets]
    named += [(str(path), read_config(path)) for path in configs]
    if deltas:
        steps = {text: V2PE(read_delta(text)) for text in deltas}
        named = [
            (f"{name}, delta {text}", dataclasses.replace(setting, positions=step))
            for name, setting in named
            for text, step in steps.items()
        ]
    settings = dict(named)
    for name in RESERVED & settings.keys():
        raise InputError(f"--config {name}: rows of that name are something else's: rename the file")
    if len(settings) < len(named):
        raise InputError(f"{', '.join(name for name, _ in named)}: a setting was passed twice: pass it once")
    return settings


def writable(path: Path | None, option: str) -> None:
    """Raises `InputError` if a file could not be made there, before any work is done for it."""
    if path is None:
        return
    if not path.absolute().parent.is_dir():
        raise InputError(f"{option} {path}: there is no folder {path.parent}: make it first")
    if path.is_dir() or not os.access(path if path.exists() else path.absolute().parent, os.W_OK):
        raise InputError(f"{option} {path}: no file can be written there: pass the name of one that can")


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Rows of the same columns.

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
