"""The command line: mminfer bench."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mminfer.command import OUT, read_settings, told_plainly, writable, write_csv
from mminfer.errors import InputError
from mminfer.needle_cli import needle

if TYPE_CHECKING:
    from mminfer.bench.contexts import Context
    from mminfer.bench.fidelity import FidelityRow
    from mminfer.bench.protocols import Protocol
    from mminfer.bench.speed import SpeedRow
    from mminfer.config import InferenceConfig
    from mminfer.engine import Engine

bench = typer.Typer(help="Measure what settings cost and save.")
bench.command()(needle)

DEFAULT_PRESETS = ["off", "aim", "lookm-20", "balanced"]
PLOT_COSTS = {"prompt FLOPs": "flops_kept", "cache bytes": "cache_kept"}


@bench.callback(invoke_without_command=True)
@told_plainly
def measure(
    context: typer.Context,
    model: Annotated[str, typer.Option(help="Checkpoint folder or hub name; 'nano' is the bundled model.")] = "nano",
    preset: Annotated[
        list[str] | None, typer.Option(help=f"A setting; repeat to compare. Default: {', '.join(DEFAULT_PRESETS)}.")
    ] = None,
    config: Annotated[
        list[Path] | None, typer.Option(help="A JSON file written by InferenceConfig.to_json(); repeat to compare.")
    ] = None,
    delta: Annotated[
        list[str] | None, typer.Option(help="V2PE step put into every setting: 1/16, auto; repeat to compare.")
    ] = None,
    image: Annotated[list[str] | None, typer.Option(help="An image file; repeat for more.")] = None,
    video: Annotated[list[str] | None, typer.Option(help="A video file; repeat for more.")] = None,
    prompt: Annotated[str | None, typer.Option(help="The question about these files.")] = None,
    images: Annotated[int, typer.Option(min=1, help="Without files: pictures drawn for a context.")] = 16,
    picture_size: Annotated[int | None, typer.Option(min=8, help="Pixels a side of a drawn picture.")] = None,
    seed: Annotated[int, typer.Option(help="Of the drawn contexts.")] = 0,
    batch: Annotated[int, typer.Option(min=1, help="Chats in a timed call.")] = 1,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens of a timed or compared answer.")] = 32,
    repeats: Annotated[
        int | None, typer.Option(min=0, help="Timed calls of each setting; 0: no timing. Default: 5, with --plot 0.")
    ] = None,
    protocol: Annotated[
        list[str] | None,
        typer.Option(help="in-prompt, next-turn, streamed: how fidelity is asked; repeat. Default: next-turn."),
    ] = None,
    contexts: Annotated[int, typer.Option(min=0, help="Drawn contexts for fidelity; 0: no fidelity.")] = 2,
    questions: Annotated[int, typer.Option(min=1, help="Questions about each.")] = 4,
    chunk_size: Annotated[int, typer.Option(min=1, help="Tokens of a chunk, where contexts are streamed.")] = 512,
    plot: Annotated[
        Path | None, typer.Option(help="Draw fidelity against FLOPs and cache, baselines beside it, to this picture.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, ... Default: float32 on the CPU.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and no table.")] = False,
    csv_path: Annotated[Path | None, typer.Option("--csv", help="Write the rows to this file too.")] = None,
) -> None:
    """Measure what settings cost and save, on any model, beside the unpatched host.

    Time and memory: processor, vision tower, prompt pass and decoding apart, host and settings in turn in one
    process. Fidelity: the uncompressed model's continuation, forced upon every setting. `mminfer bench needle` asks
    for right answers.
    """
    if context.invoked_subcommand is not None:
        _no_options_before(context)
        return
    settings = read_settings(
        preset or ([] if config or plot is not None else DEFAULT_PRESETS), config or [], delta or []
    )
    repeats = (5 if plot is None else 0) if repeats is None else repeats
    files = bool(image or video)
    if not repeats and not contexts:
        raise InputError("--repeats 0 and --contexts 0: nothing is left to measure: leave one of them out")
    for path, option in ((csv_path, "--csv"), (plot, "--plot")):
        writable(path, option)
    if plot is not None and not contexts:
        raise InputError(f"--plot {plot} and --contexts 0: a plot needs fidelity, of at least one context")
    if plot is not None:
        from mminfer.bench.plots import check_available

        check_available()
        settings = _ladders() | settings
    if not files and prompt is not None:
        raise InputError(f"--prompt {prompt!r} without files: pass --image or --video, or leave it out")
    protocols = _protocols(protocol or ["next-turn"])
    measured = _contexts(image or [], video or [], prompt, images, max(contexts, batch), questions, seed, picture_size)

    from mminfer.needle.runner import load

    engines = load(model, settings, device, dtype)
    origin = {
        "model": model,
        **_origin(next(iter(engines.values()))),
        "images": len(image or []) or images,
        "seed": seed,
    }
    speed = _speed(engines, measured, batch, new_tokens, repeats)
    fidelity = _fidelity(engines, measured[: 1 if files else contexts], protocols, new_tokens, chunk_size, contexts)
    if plot is not None:
        _plot(fidelity, plot, f"{model}, {origin['images']} images")
    rows = _joined(origin, speed, fidelity)
    if csv_path is not None:
        write_csv(csv_path, rows)
    if as_json:
        named = {name: setting.to_dict() for name, setting in settings.items()}
        sys.stdout.write(json.dumps(origin | {"settings": named, "rows": rows}) + "\n")
        return
    from mminfer.bench import tables

    for table in (*tables.speed_tables(speed), *tables.fidelity_tables(fidelity)):
        OUT.print(table)
        OUT.print()
    if plot is not None:
        OUT.print(f"drawn: {plot}", markup=False, highlight=False)


def _no_options_before(context: typer.Context) -> None:
    """Options of the group would be lost on a command behind it."""
    given = [
        name
        for name in context.params
        if (source := context.get_parameter_source(name)) is not None and source.name == "COMMANDLINE"
    ]
    if given:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise InputError(f"{options}: wanted behind `{context.invoked_subcommand}`, where it counts")


def _ladders() -> dict[str, InferenceConfig]:
    from mminfer.bench.ladders import cache_ladders, token_ladders

    ladders = (*token_ladders(), *cache_ladders())
    return {name: config for ladder in ladders for name, config in ladder.settings.items()}


def _protocols(names: list[str]) -> list[Protocol]:
    from mminfer.bench.protocols import Protocol

    known = [str(protocol) for protocol in Protocol]
    for name in names:
        if name not in known:
            raise InputError(f"--protocol {name}: wanted one of {', '.join(known)}")
    return [Protocol(name) for name in dict.fromkeys(names)]


def _contexts(
    files: list[str],
    videos: list[str],
    prompt: str | None,
    images: int,
    count: int,
    questions: int,
    seed: int,
    picture_size: int | None,
) -> list[Context]:
    from mminfer.bench.contexts import made_contexts, own_context

    if files or videos:
        return [own_context(files, videos, prompt)]
    return made_contexts(images, count, questions, seed, picture_size)


def _origin(engine: Engine) -> dict[str, Any]:
    """What every row of a run shares."""
    import torch
    import transformers

    return {
        "device": str(engine.device),
        "dtype": str(engine.model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _speed(
    engines: dict[str, Engine], contexts: list[Context], batch: int, new_tokens: int, repeats: int
) -> list[SpeedRow]:
    if repeats == 0:
        return []
    from mminfer.bench.speed import measure

    chats = [(c := contexts[n % len(contexts)]).chat(c.questions[0]) for n in range(batch)]
    settings = {name: engine.config for name, engine in engines.items()}
    return measure(next(iter(engines.values())), settings, chats, new_tokens, repeats)


def _fidelity(
    engines: dict[str, Engine],
    contexts: list[Context],
    protocols: list[Protocol],
    tokens: int,
    chunk_size: int,
    wanted: int,
) -> list[FidelityRow]:
    if wanted == 0:
        return []
    from mminfer.bench.fidelity import measure

    return measure(engines, contexts, protocols, tokens, chunk_size)


def _plot(rows: list[FidelityRow], path: Path, title: str) -> None:
    from mminfer.bench.ladders import cache_ladders, token_ladders
    from mminfer.bench.plots import Panels, Point, pareto_plot

    ladders = (*token_ladders(), *cache_ladders())
    rules = {name: ladder for ladder in ladders for name in ladder.settings}
    panels = []
    for protocol in dict.fromkeys(row.protocol for row in rows):
        points = []
        for row in rows:
            ladder, cost = rules.get(row.setting), {name: getattr(row, kept) for name, kept in PLOT_COSTS.items()}
            if row.protocol == protocol:
                rule, baseline = (row.setting, False) if ladder is None else (ladder.rule, ladder.baseline)
                points.append(Point(rule, cost, row.kl, baseline))
        panels.append(Panels(f"{title}, {protocol}", points, "KL to the uncompressed model, nats"))
    pareto_plot(panels, list(PLOT_COSTS), path)


def _joined(origin: dict[str, Any], speed: list[SpeedRow], fidelity: list[FidelityRow]) -> list[dict[str, Any]]:
    """One row a setting and protocol, all with the same columns; those of what was not measured are empty."""
    timed = {row.setting: row.to_dict() for row in speed}
    judged = [dataclasses.asdict(row) for row in fidelity]
    names = [name for name in timed if name not in {row["setting"] for row in judged}]
    rows = [{"setting": name, "protocol": ""} for name in names] + judged
    columns = dict.fromkeys(column for row in (*rows, *timed.values()) for column in row)
    return [origin | dict.fromkeys(columns, "") | row | timed.get(row["setting"], {}) for row in rows]
