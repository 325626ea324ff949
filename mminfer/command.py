"""What the commands share: where they print, how they refuse, settings from a file."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console

from mminfer.errors import InputError, MminferError

if TYPE_CHECKING:
    from mminfer.config import InferenceConfig

OUT, ERR = Console(), Console(stderr=True)


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
