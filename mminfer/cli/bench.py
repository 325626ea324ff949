"""The command line: mminfer bench."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mminfer.cli import options
from mminfer.cli.console import ERR, OUT, check_writable, print_json, reports_errors, write_csv
from mminfer.cli.messages import checked_chat
from mminfer.cli.needle import needle
from mminfer.cli.rechecking import calibrations_in, print_promises, promises_as_data, rechecked
from mminfer.cli.settings import compared_settings, with_delta
from mminfer.errors import InputError

if TYPE_CHECKING:
    from mminfer.bench.contexts import Context
    from mminfer.bench.fidelity import FidelityRow
    from mminfer.bench.plan import Plan
    from mminfer.bench.protocols import Protocol
    from mminfer.bench.speed import SpeedRow
    from mminfer.bench.sweeps import Sweep
    from mminfer.calibration import Promise
    from mminfer.config import InferenceConfig
    from mminfer.engine import Engine

bench = typer.Typer(help="Measure what settings cost and save.")
bench.command()(needle)

DEFAULT_PRESETS = ["off", "aim", "lookm-20", "balanced"]
DEFAULT_REPEATS = 5
PLOT_COSTS = {"prompt FLOPs": "flops_kept", "cache bytes": "cache_kept"}


@bench.callback(invoke_without_command=True)
@reports_errors
def measure(
    context: typer.Context,
    model: options.Model = "nano",
    preset: Annotated[list[str] | None, options.presets_option(", ".join(DEFAULT_PRESETS))] = None,
    config: options.Configs = None,
    settings_file: Annotated[
        list[Path] | None,
        typer.Option(
            "--settings",
            help="Measure the settings in this file, which mminfer calibrate wrote, and check their promise on other "
            "samples; repeat the option for more.",
        ),
    ] = None,
    samples: Annotated[
        Path | None,
        typer.Option(help="Check promises on the samples in this file of JSON lines, as mminfer calibrate takes it."),
    ] = None,
    delta: options.Deltas = None,
    image: options.Image = None,
    video: options.Video = None,
    prompt: Annotated[str | None, typer.Option(help="Ask this question about these files.")] = None,
    images: Annotated[
        int,
        typer.Option(min=1, max=options.MOST_PICTURES, help="Without files, draw this many pictures for a context."),
    ] = 16,
    picture_size: Annotated[
        int | None, typer.Option(min=8, max=options.MOST_SIDE, help="Draw pictures of this many pixels a side.")
    ] = None,
    seed: options.Seed = 0,
    batch: Annotated[
        int, typer.Option(min=1, max=options.MOST_PICTURES, help="Answer this many chats in a timed call.")
    ] = 1,
    new_tokens: Annotated[
        int, typer.Option(min=2, max=options.MOST_TOKENS, help="Time and compare answers of this many tokens.")
    ] = 32,
    repeats: Annotated[
        int | None,
        typer.Option(
            min=0,
            help=f"Time this many calls of each setting; 0 times nothing. By default: {DEFAULT_REPEATS}, and 0 with "
            "--plot.",
        ),
    ] = None,
    protocol: Annotated[
        list[str] | None,
        typer.Option(
            help="Ask for fidelity in-prompt, next-turn or streamed; repeat the option for more. By default: next-turn."
        ),
    ] = None,
    contexts: Annotated[
        int, typer.Option(min=0, help="Draw this many contexts for fidelity; 0 leaves fidelity out.")
    ] = 2,
    questions: Annotated[int, typer.Option(min=1, help="Ask this many questions about each of them.")] = 4,
    chunk_size: Annotated[
        int | None,
        typer.Option(
            min=1, help="Stream contexts in chunks of this many tokens. By default: 512, or those of the longest image."
        ),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(help="Draw fidelity against FLOPs and cache, beside the baselines, and write the picture here."),
    ] = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    as_json: options.AsJson = False,
    csv_path: options.Csv = None,
) -> None:
    """Measure what settings cost and save, on any model, beside the unpatched host.

    Time and memory: processor, vision tower, prompt pass and decoding apart, host and settings in turn in one
    process. Fidelity: the uncompressed model's continuation, forced upon every setting. `mminfer bench needle` asks
    for right answers.
    """
    given = _options_given(context)
    if context.invoked_subcommand is not None:
        if given:
            raise InputError(f"{', '.join(given)}: wanted behind `{context.invoked_subcommand}`, where it counts")
        return
    check_writable(csv_path, "--csv")
    check_writable(plot, "--plot")
    repeats = (DEFAULT_REPEATS if plot is None else 0) if repeats is None else repeats
    if not repeats and not contexts:
        raise InputError("--repeats 0 and --contexts 0: nothing is left to measure: leave one of them out")
    if samples is not None and not settings_file:
        raise InputError(f"--samples {samples} without --settings: they are to check a promise: pass one to check")
    calibrations = calibrations_in(settings_file or [])
    settings = compared_settings(preset or [], [*(config or []), *(settings_file or [])], delta or [])
    optional = {} if settings and plot is None else _unnamed_settings(plot, contexts, delta or [])
    protocols = _protocols(protocol or ["next-turn"]) if contexts else []
    if image or video:
        if "--contexts" in given and contexts > 1:
            raise InputError(f"--contexts {contexts} beside files: they are one context: leave it out, or pass 0")
        measured, questions = [_file_context(image or [], video or [], prompt, given)], 1
        facts: dict[str, Any] = {"prompt": prompt}
    else:
        count = max(contexts, batch)
        measured = _drawn_contexts(images, count, questions, seed, picture_size, prompt)
        facts = {"images": images, "picture_size": picture_size, "seed": seed, "contexts": count}
    from mminfer.bench.plan import Plan

    plan = Plan(measured, batch, new_tokens, repeats, protocols, chunk_size)
    found = _measure(model, _without_refused(model, optional) | settings, plan, device, dtype)
    if calibrations:
        found = replace(found, promises=rechecked(found.plain, model, calibrations, samples, images, seed))
    facts = {"model": model, **found.origin, **facts}
    facts |= {"batch": batch, "new_tokens": new_tokens, "questions": questions, "chunk_size": found.chunk_size}
    title = f"{model}, {images} images" if "images" in facts else model
    _report(found, facts, title=title, as_json=as_json, csv_path=csv_path, plot=plot)


@dataclass(frozen=True)
class _Found:
    """What a plan gave.

    Args:
        settings: by name, as they were measured.
        origin: versions and machine.
        timed: rows of time and memory.
        compared: rows of fidelity.
        chunk_size: tokens of a streamed chunk.
        plain: an engine of the model.
        promises: of calibrated settings, as other samples have it.
    """

    settings: Mapping[str, InferenceConfig]
    origin: dict[str, Any]
    timed: Sequence[SpeedRow]
    compared: Sequence[FidelityRow]
    chunk_size: int
    plain: Engine
    promises: Mapping[str, Promise] = field(default_factory=dict)


def _measure(
    model: str, settings: dict[str, InferenceConfig], plan: Plan, device: str | None, dtype: str | None
) -> _Found:
    from mminfer.bench.plan import measure, origin
    from mminfer.needle.runner import load

    if not settings:
        raise InputError("this model takes none of the default settings: name one with --preset or --config")
    plan.check(settings)
    engines = load(model, settings, device, dtype)
    some = next(iter(engines.values()))
    return _Found(settings, origin(some), *measure(plan, engines), some)


def _report(
    found: _Found, facts: dict[str, Any], *, title: str, as_json: bool, csv_path: Path | None, plot: Path | None
) -> None:
    """Writes the files that were asked for, and prints one JSON object or the tables."""
    from mminfer.bench.plan import joined_rows

    rows = [facts | row for row in joined_rows(found.timed, found.compared)]
    if csv_path is not None:
        write_csv(csv_path, rows)
    if plot is not None:
        _draw_plot(found.compared, plot, title)
    if as_json:
        named = {name: setting.to_dict() for name, setting in found.settings.items()}
        known = {"promises": promises_as_data(found.promises)} if found.promises else {}
        print_json(facts | {"settings": named, "rows": rows} | known)
    else:
        _print_tables(found, plot)
        print_promises(found.promises)


def _print_tables(found: _Found, plot: Path | None) -> None:
    from mminfer.bench import tables

    for table in (*tables.speed_tables(found.timed), *tables.fidelity_tables(found.compared)):
        OUT.print(table)
        OUT.print()
    if plot is not None:
        OUT.print(f"drawn: {plot}", markup=False, highlight=False)


def _options_given(context: typer.Context) -> list[str]:
    """Options on the command line, by their names there."""
    found = []
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name or "")
        if source is not None and source.name == "COMMANDLINE":
            found.append(parameter.opts[0])
    return found


def _file_context(images: Sequence[str], videos: Sequence[str], prompt: str | None, given: Sequence[str]) -> Context:
    """The user's files, checked; options of drawn contexts do not go with them."""
    from mminfer.bench.contexts import own_context
    from mminfer.inputs.content import MediaOptions

    idle = [name for name in ("--images", "--picture-size", "--seed", "--questions") if name in given]
    if idle:
        raise InputError(f"{', '.join(idle)} beside files: only drawn contexts take it: leave one or the other out")
    context = own_context(images, videos, prompt)
    checked_chat(context.chat(context.questions[0]), MediaOptions())
    return context


def _drawn_contexts(
    images: int, count: int, questions: int, seed: int, picture_size: int | None, prompt: str | None
) -> list[Context]:
    """Contexts drawn on the spot, which bring questions of their own."""
    from mminfer.bench.contexts import made_contexts

    if prompt is not None:
        raise InputError(f"--prompt {prompt!r} without files: pass --image or --video, or leave it out")
    return made_contexts(images, count, questions, seed, picture_size)


def _protocols(names: Sequence[str]) -> list[Protocol]:
    from mminfer.bench.protocols import Protocol

    known = [str(protocol) for protocol in Protocol]
    for name in names:
        if name not in known:
            raise InputError(f"--protocol {name}: wanted one of {', '.join(known)}")
    return [Protocol(name) for name in dict.fromkeys(names)]


def _without_refused(model: str, optional: dict[str, InferenceConfig]) -> dict[str, InferenceConfig]:
    """Of settings that nobody named those that the model takes; a line is printed for each of the others."""
    from mminfer.needle.runner import refusals

    refused = refusals(model, optional) if optional else {}
    for name, reason in refused.items():
        ERR.print(f"left out: {name}: {reason}", style="yellow", markup=False, highlight=False)
    return {name: config for name, config in optional.items() if name not in refused}


def _all_sweeps() -> tuple[Sweep, ...]:
    from mminfer.bench.sweeps import cache_sweeps, token_sweeps

    return (*token_sweeps(), *cache_sweeps())


def _unnamed_settings(plot: Path | None, contexts: int, deltas: Sequence[str]) -> dict[str, InferenceConfig]:
    """What is measured without being named: what a plot is drawn of, at the V2PE step if there is one, or a default."""
    from mminfer.bench.plots import check_drawable

    if plot is None:
        return compared_settings(DEFAULT_PRESETS, [], deltas)
    check_drawable(plot)
    if not contexts:
        raise InputError(f"--plot {plot} and --contexts 0: a plot needs fidelity, of at least one context")
    if len(deltas) > 1:
        raise InputError(f"--plot {plot} with the steps {', '.join(deltas)}: a plot is of one: pass one --delta")
    settings = {name: config for sweep in _all_sweeps() for name, config in sweep.settings.items()}
    for delta in deltas:
        settings = {name: with_delta(config, delta) for name, config in settings.items()}
    return settings


def _draw_plot(rows: Sequence[FidelityRow], path: Path, title: str) -> None:
    from mminfer.bench.plots import Panels, Point, pareto_plot

    rules = {name: sweep for sweep in _all_sweeps() for name in sweep.settings}
    panels = []
    for protocol in dict.fromkeys(row.protocol for row in rows):
        points = []
        for row in rows:
            sweep, cost = rules.get(row.setting), {name: getattr(row, kept) for name, kept in PLOT_COSTS.items()}
            if row.protocol == protocol:
                rule, baseline = (row.setting, False) if sweep is None else (sweep.rule, sweep.baseline)
                points.append(Point(rule, cost, row.kl, baseline))
        panels.append(Panels(f"{title}, {protocol}", points, "KL to the uncompressed model, nats"))
    pareto_plot(panels, list(PLOT_COSTS), path)
