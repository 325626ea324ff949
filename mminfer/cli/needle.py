"""The command line: mminfer bench needle."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mminfer.cli import options
from mminfer.cli.console import OUT, check_writable, print_json, reports_errors, write_csv
from mminfer.cli.settings import compared_settings
from mminfer.errors import InputError

if TYPE_CHECKING:
    from mminfer.config import InferenceConfig
    from mminfer.engine import Engine
    from mminfer.needle.protocol import NeedleProtocol
    from mminfer.needle.runner import Asking
    from mminfer.needle.scores import Answer, Row


@reports_errors
def needle(
    model: options.Model = "nano",
    protocol: Annotated[
        str,
        typer.Option(help="Ask by mmneedle, temporal or labels; the bundled model knows labels only."),
    ] = "labels",
    images: Annotated[
        list[int] | None,
        typer.Option(
            help="Put this many pictures into a context; repeat the option for more lengths. The default is 16, "
            "and 10 with mmneedle."
        ),
    ] = None,
    grid: Annotated[
        int | None, typer.Option(help="mmneedle: stitch this many sub-images a side to an image. The default is 2.")
    ] = None,
    needles: Annotated[
        int | None,
        typer.Option(
            help="Hide this many needles for a question; with labels, label this many pictures at each depth. The "
            "default is 1."
        ),
    ] = None,
    samples: Annotated[
        int,
        typer.Option(
            min=1,
            max=options.MOST_PICTURES,
            help="Make this many contexts of each length, and of each depth except with labels.",
        ),
    ] = 10,
    seed: options.Seed = 0,
    depths: Annotated[
        str | None,
        typer.Option(
            help="Hide needles at these depths, such as 0,0.5,1. By default there are five; mmneedle draws them."
        ),
    ] = None,
    picture_size: Annotated[
        int | None, typer.Option(help="Draw each picture or sub-image with this many pixels a side.")
    ] = None,
    image_size: Annotated[int | None, typer.Option(help="mmneedle: stitch images of this many pixels a side.")] = None,
    preset: Annotated[list[str] | None, options.presets_option("off")] = None,
    config: options.Configs = None,
    delta: options.Deltas = None,
    next_turn: Annotated[
        bool,
        typer.Option("--next-turn", help="Read and compress the context first, then ask; else one prompt holds both."),
    ] = False,
    blind: Annotated[bool, typer.Option("--blind", help="Ask once more without the pictures.")] = False,
    prefill_chunk_size: options.PrefillChunkSize = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=options.MOST_TOKENS,
            help="Generate this many tokens at most; by default the protocol says how many.",
        ),
    ] = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    as_json: options.AsJson = False,
    csv_path: options.Csv = None,
) -> None:
    """Find needles in long contexts, under one setting or several: accuracy, time and cache.

    The JSON object holds every answer as well.
    """
    from mminfer.needle.pictures import check_available
    from mminfer.needle.runner import Asking, load, run
    from mminfer.needle.scores import rows_of

    given = {"grid": grid, "needles": needles, "picture_size": picture_size, "image_size": image_size}
    chosen = _protocol(protocol, {**given, "depths": None if depths is None else _parsed_depths(depths)})
    lengths = list(dict.fromkeys(images or [chosen.default_images]))
    settings = compared_settings(preset or ([] if config else ["off"]), config or [], delta or [])
    for length in lengths:
        chosen.check(length)
    check_writable(csv_path, "--csv")
    check_available()

    engines = load(model, settings, device, dtype)
    asking = Asking(next_turn, blind, max_new_tokens, prefill_chunk_size)
    answers = run(engines, chosen, lengths, samples, seed, asking)
    rows = rows_of(answers, chosen)
    origin = {"model": model} | _origin(next(iter(engines.values())), chosen, asking) | {"seed": seed}
    if csv_path is not None:
        write_csv(csv_path, [origin | dataclasses.asdict(row) for row in rows])
    if as_json:
        print_json(origin | _report(settings, rows, answers))
    else:
        _print_tables(f"{protocol} on {model}, {origin['turn']}", rows)


def _report(settings: Mapping[str, InferenceConfig], rows: Sequence[Row], answers: Sequence[Answer]) -> dict[str, Any]:
    return {
        "settings": {name: setting.to_dict() for name, setting in settings.items()},
        "rows": [dataclasses.asdict(row) for row in rows],
        "answers": [answer.to_dict() for answer in answers],
    }


def _print_tables(title: str, rows: Sequence[Row]) -> None:
    from mminfer.needle.tables import accuracy_tables, cost_table

    OUT.print(title, markup=False, highlight=False)
    for table in (*accuracy_tables(rows), cost_table(rows)):
        OUT.print(table)


def _protocol(name: str, given: dict[str, Any]) -> NeedleProtocol:
    """The protocol with the options that were given."""
    from mminfer.needle import PROTOCOLS

    if name not in PROTOCOLS:
        raise InputError(f"--protocol {name}: wanted one of {', '.join(PROTOCOLS)}")
    cls = PROTOCOLS[name]
    known = {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    given = {field: value for field, value in given.items() if value is not None}
    for field, value in given.items():
        if field not in known:
            option = f"--{field.replace('_', '-')}"
            raise InputError(f"{option} {value}: {name} has no such setting: leave it out")
    return cls(**given)


def _parsed_depths(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise InputError(f"--depths {text}: wanted numbers from 0 to 1 with commas between, such as 0,0.5,1") from error


def _origin(engine: Engine, protocol: NeedleProtocol, asking: Asking) -> dict[str, Any]:
    """What every row of a run shares."""
    import torch
    import transformers

    return {
        "protocol": protocol.name,
        **dataclasses.asdict(protocol),  # type: ignore[call-overload]
        "turn": "next-turn" if asking.next_turn else "in-prompt",
        "prefill_chunk_size": asking.prefill_chunk_size,
        "device": str(engine.device),
        "dtype": str(engine.model.dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
