"""The command line: mminfer bench needle."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mminfer.cli.options import OUT, read_settings, told_plainly, writable, write_csv
from mminfer.errors import InputError

if TYPE_CHECKING:
    from mminfer.engine import Engine
    from mminfer.needle.protocol import NeedleProtocol
    from mminfer.needle.runner import Asking


@told_plainly
def needle(
    model: Annotated[str, typer.Option(help="Checkpoint folder or hub name; 'nano' is the bundled model.")] = "nano",
    protocol: Annotated[
        str, typer.Option(help="mmneedle, temporal or labels; the bundled model knows labels alone.")
    ] = "labels",
    images: Annotated[
        list[int] | None, typer.Option(help="Pictures in a context; repeat for more lengths. Default: 16, mmneedle 10.")
    ] = None,
    grid: Annotated[int | None, typer.Option(help="mmneedle: sub-images a side of an image. Default: 2.")] = None,
    needles: Annotated[
        int | None, typer.Option(help="Needles a question; labels: labelled pictures at each depth. Default: 1.")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Contexts of each length (and depth, but for labels).")] = 10,
    seed: Annotated[int, typer.Option(help="Of the contexts.")] = 0,
    depths: Annotated[
        str | None, typer.Option(help="Where needles stand, such as 0,0.5,1. Default: five; mmneedle: by lot.")
    ] = None,
    picture_size: Annotated[int | None, typer.Option(help="Pixels a side of a picture or sub-image.")] = None,
    image_size: Annotated[int | None, typer.Option(help="mmneedle: pixels a side of a stitched image.")] = None,
    preset: Annotated[list[str] | None, typer.Option(help="A setting; repeat to compare. Default: off.")] = None,
    config: Annotated[
        list[Path] | None, typer.Option(help="A JSON file written by InferenceConfig.to_json(); repeat to compare.")
    ] = None,
    delta: Annotated[
        list[str] | None, typer.Option(help="V2PE step put into every setting: 1/16, auto; repeat to compare.")
    ] = None,
    next_turn: Annotated[
        bool, typer.Option("--next-turn", help="Read and compress the context first, then ask; else all in one prompt.")
    ] = False,
    blind: Annotated[bool, typer.Option("--blind", help="Ask once more without the pictures.")] = False,
    prefill_chunk_size: Annotated[
        int | None, typer.Option(min=1, help="Tokens of a prompt that go through the model at a time. Default: all.")
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Of an answer. Default: as the protocol needs.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, ... Default: float32 on the CPU.")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object, answers included, and no table.")
    ] = False,
    csv_path: Annotated[Path | None, typer.Option("--csv", help="Write the rows to this file too.")] = None,
) -> None:
    """Find needles in long contexts, under one setting or several: accuracy, time and cache."""
    from mminfer.needle.pictures import check_available
    from mminfer.needle.runner import Asking, load, run
    from mminfer.needle.scores import rows_of

    fields = {"grid": grid, "needles": needles, "picture_size": picture_size, "image_size": image_size}
    chosen = _protocol(protocol, {**fields, "depths": None if depths is None else _depths(depths)})
    lengths = list(dict.fromkeys(images or [chosen.default_images]))
    settings = read_settings(preset or ([] if config else ["off"]), config or [], delta or [])
    for length in lengths:
        chosen.check(length)
    writable(csv_path, "--csv")
    check_available()

    engines = load(model, settings, device, dtype)
    asking = Asking(next_turn, blind, max_new_tokens, prefill_chunk_size)
    answers = run(engines, chosen, lengths, samples, seed, asking)
    some = next(iter(engines.values()))
    origin = {"model": model} | _origin(some, chosen, asking) | {"seed": seed}
    rows = rows_of(answers, chosen)
    if csv_path is not None:
        write_csv(csv_path, [origin | dataclasses.asdict(row) for row in rows])
    if as_json:
        report = origin | {
            "settings": {name: setting.to_dict() for name, setting in settings.items()},
            "rows": [dataclasses.asdict(row) for row in rows],
            "answers": [answer.to_dict() for answer in answers],
        }
        sys.stdout.write(json.dumps(report) + "\n")
        return
    from mminfer.needle.tables import accuracy_tables, cost_table

    OUT.print(f"{protocol} on {model}, {origin['turn']}", markup=False, highlight=False)
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


def _depths(text: str) -> tuple[float, ...]:
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
