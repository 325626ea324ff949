"""The command line: mminfer generate | calibrate | bench | inspect | serve | doctor.

Nothing here loads torch or transformers: a command does so once its options are read.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Annotated

import typer

from mminfer import __version__
from mminfer.cli.bench import bench
from mminfer.cli.calibrate import calibrate
from mminfer.cli.console import ERR, exit_code, reports_errors
from mminfer.cli.doctor import doctor
from mminfer.cli.generate import generate
from mminfer.cli.inspect import inspect
from mminfer.cli.serve import serve
from mminfer.cli.settings import load_technique_file

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help="Run vision-language models over long contexts, at a fraction of the compute.",
)
app.command()(generate)
app.command()(calibrate)
app.add_typer(bench, name="bench")
app.command()(inspect)
app.command()(serve)
app.command()(doctor)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"mminfer {__version__}")
        raise typer.Exit


@app.callback()
@reports_errors
def _options_of_all(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    technique_file: Annotated[
        list[Path] | None,
        typer.Option(
            help="Run this Python file, whose technique classes settings and presets may then name; repeat the option "
            "for more files."
        ),
    ] = None,
) -> None:
    """Options that stand before a command."""
    for path in technique_file or []:
        load_technique_file(path)


def main() -> None:
    """Runs the command line, with the warnings of libraries as single lines."""
    warnings.showwarning = lambda message, *_, **__: ERR.print(
        f"warning: {message}", style="yellow", markup=False, highlight=False
    )
    sys.exit(exit_code(app))
