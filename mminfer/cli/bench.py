"""The command line: mminfer bench."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mminfer.cli.needle import needle
from mminfer.cli.options import ERR, OUT, read_delta, read_settings, told_plainly, writable, write_csv
from mminfer.errors import InputError

if TYPE_CHECKING:
    from mminfer.bench.contexts import Context
    from mminfer.bench.fidelity import FidelityRow
    from mminfer.bench.ladders import Ladder
    from mminfer.bench.protocols import Protocol
    from mminfer.config import InferenceConfig

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
    chunk_size: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens of a chunk, where contexts are streamed. Default: 512, or the longest image."),
    ] = None,
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
    given = _given(context)
    if context.invoked_subcommand is not None:
        if given:
            raise InputError(f"{', '.join(given)}: wanted behind `{context.invoked_subcommand}`, where it counts")
        return
    for path, option in ((csv_path, "--csv"), (plot, "--plot")):
        writable(path, option)
    repeats = (5 if plot is None else 0) if repeats is None else repeats
    if not repeats and not contexts:
        raise InputError("--repeats 0 and --contexts 0: nothing is left to measure: leave one of them out")
    settings = read_settings(preset or [], config or [], delta or [])
    unasked = {} if settings or plot is not None else read_settings(DEFAULT_PRESETS, [], delta or [])
    if plot is not None:
        unasked = _ladders(plot, contexts, delta or [])
    protocols = _protocols(protocol or ["next-turn"]) if contexts else []
    if image or video:
        measured = [_own(image or [], video or [], prompt, given)]
        drawn: dict[str, Any] = {"prompt": prompt}
    else:
        if prompt is not None:
            raise InputError(f"--prompt {prompt!r} without files: pass --image or --video, or leave it out")
        drawn = {"images": images, "picture_size": picture_size, "seed": seed, "contexts": max(contexts, batch)}
        measured = _drawn(images, max(contexts, batch), questions, seed, picture_size)

    from mminfer.bench import tables
    from mminfer.bench.plan import Plan, joined_rows, measure, origin
    from mminfer.needle.runner import load

    plan = Plan(measured, batch, new_tokens, repeats, protocols, chunk_size)
    settings = _taken(model, unasked) | settings
    if not settings:
        raise InputError("this model takes none of the default settings: name one with --preset or --config")
    plan.check(settings)
    engines = load(model, settings, device, dtype)
    timed, compared, chunk = measure(plan, engines)
    asked = {"batch": batch, "new_tokens": new_tokens, "questions": questions, "chunk_size": chunk}
    facts = {"model": model, **origin(next(iter(engines.values()))), **drawn, **asked}
    rows = [facts | row for row in joined_rows(timed, compared)]
    if csv_path is not None:
        write_csv(csv_path, rows)
    if plot is not None:
        _plot(compared, plot, f"{model}, {images} images" if "images" in drawn else model)
    if as_json:
        named = {name: setting.to_dict() for name, setting in settings.items()}
        sys.stdout.write(json.dumps(facts | {"settings": named, "rows": rows}) + "\n")
        return
    for table in (*tables.speed_tables(timed), *tables.fidelity_tables(compared)):
        OUT.print(table)
        OUT.print()
    if plot is not None:
        OUT.print(f"drawn: {plot}", markup=False, highlight=False)


def _given(context: typer.Context) -> list[str]:
    """Options on the command line, by their names there."""
    found = []
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name or "")
        if source is not None and source.name == "COMMANDLINE":
            found.append(parameter.opts[0])
    return found


def _own(images: Sequence[str], videos: Sequence[str], prompt: str | None, given: Sequence[str]) -> Context:
    """The user's files, checked; options of drawn contexts do not go with them."""
    from mminfer.bench.contexts import own_context
    from mminfer.inputs.messages import MediaOptions, normalise_messages

    idle = [name for name in ("--images", "--picture-size", "--seed", "--questions") if name in given]
    if idle:
        raise InputError(f"{', '.join(idle)} beside files: only drawn contexts take it: leave one or the other out")
    context = own_context(images, videos, prompt)
    normalise_messages(context.chat(context.questions[0]), MediaOptions())
    return context


def _drawn(images: int, count: int, questions: int, seed: int, picture_size: int | None) -> list[Context]:
    from mminfer.bench.contexts import made_contexts

    return made_contexts(images, count, questions, seed, picture_size)


def _protocols(names: Sequence[str]) -> list[Protocol]:
    from mminfer.bench.protocols import Protocol

    known = [str(protocol) for protocol in Protocol]
    for name in names:
        if name not in known:
            raise InputError(f"--protocol {name}: wanted one of {', '.join(known)}")
    return [Protocol(name) for name in dict.fromkeys(names)]


def _taken(model: str, unasked: dict[str, InferenceConfig]) -> dict[str, InferenceConfig]:
    """Of settings that nobody named those that the model takes; the others are told."""
    from mminfer.needle.runner import refusals

    refused = refusals(model, unasked) if unasked else {}
    for name, reason in refused.items():
        ERR.print(f"left out: {name}: {reason}", style="yellow", markup=False, highlight=False)
    return {name: config for name, config in unasked.items() if name not in refused}


def _all_ladders() -> tuple[Ladder, ...]:
    from mminfer.bench.ladders import cache_ladders, token_ladders

    return (*token_ladders(), *cache_ladders())


def _ladders(plot: Path, contexts: int, deltas: Sequence[str]) -> dict[str, InferenceConfig]:
    """What a plot is drawn of, at the V2PE step if there is one."""
    from mminfer.bench.plots import check_drawable
    from mminfer.positions.v2pe import V2PE

    check_drawable(plot)
    if not contexts:
        raise InputError(f"--plot {plot} and --contexts 0: a plot needs fidelity, of at least one context")
    if len(deltas) > 1:
        raise InputError(f"--plot {plot} with the steps {', '.join(deltas)}: a plot is of one: pass one --delta")
    settings = {name: config for ladder in _all_ladders() for name, config in ladder.settings.items()}
    for delta in deltas:
        settings = {n: replace(config, positions=V2PE(read_delta(delta))) for n, config in settings.items()}
    return settings


def _plot(rows: Sequence[FidelityRow], path: Path, title: str) -> None:
    from mminfer.bench.plots import Panels, Point, pareto_plot

    rules = {name: ladder for ladder in _all_ladders() for name in ladder.settings}
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
