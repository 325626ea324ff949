"""The command line: mminfer generate | bench | inspect | doctor."""

from __future__ import annotations

import json
import platform
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from mminfer.cli.asking import request_messages, request_settings
from mminfer.cli.bench import bench
from mminfer.cli.inspect import inspect
from mminfer.cli.options import ERR as _err
from mminfer.cli.options import OUT as _out
from mminfer.cli.options import told_plainly

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help="Vision-language models over long contexts, at a fraction of the compute.",
)
app.add_typer(bench, name="bench")
app.command()(inspect)


@app.command()
@told_plainly
def generate(
    prompt: Annotated[
        str | None, typer.Option(help="The question. Default: the one that comes with the bundled images.")
    ] = None,
    model: Annotated[str, typer.Option(help="Checkpoint folder or hub name; 'nano' is the bundled model.")] = "nano",
    image: Annotated[
        list[str] | None,
        typer.Option(help="An image file; repeat for more. Default with nano: the bundled ones."),
    ] = None,
    images_from: Annotated[
        str | None,
        typer.Option(help="A file with the path of an image on each line, read as they are needed; - for the input."),
    ] = None,
    video: Annotated[list[str] | None, typer.Option(help="A video file; repeat for more.")] = None,
    frames: Annotated[
        int, typer.Option(min=0, help="nano: so many frames without a label between the bundled images.")
    ] = 0,
    preset: Annotated[
        str | None, typer.Option(help="What to do to the request (default: balanced); 'mminfer doctor' lists all.")
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(help="A JSON file written by InferenceConfig.to_json(), instead of a preset."),
    ] = None,
    delta: Annotated[str | None, typer.Option(help="V2PE step put into the settings: 1/256, auto.")] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Run the uncompressed model beside it.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate at most.")] = 64,
    prefill_chunk_size: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens of the prompt that go through the model at a time. Default: all at once."),
    ] = None,
    num_frames: Annotated[int, typer.Option(min=1, help="Frames taken of each video.")] = 8,
    fps: Annotated[float | None, typer.Option(help="Take so many frames a second instead.")] = None,
    max_video_tokens: Annotated[int | None, typer.Option(min=1, help="Visual tokens of one video at most.")] = None,
    allow_remote: Annotated[bool, typer.Option("--allow-remote", help="Let image URLs be fetched.")] = False,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, ... Default: float32 on the CPU.")] = None,
) -> None:
    """Answer a question about images or a video, and say what that took."""
    settings = request_settings(preset, config, delta)
    messages = request_messages(model, prompt, image or [], video or [], frames, images_from)
    from mminfer.engine import Engine  # the heavy imports come after the cheap checks
    from mminfer.inputs.content import MediaOptions
    from mminfer.inputs.messages import normalise_messages, parse_chat

    media = MediaOptions(allow_remote, num_frames, fps, max_video_tokens)
    start = time.perf_counter()
    # Mistakes are found before weights are loaded. What is read in chunks is opened when it is needed, but two runs
    # over a list share what was opened.
    later = prefill_chunk_size is not None and (not compare or images_from is not None)
    chat: Any = parse_chat(messages, media) if later else normalise_messages(messages, media)
    loading_s = time.perf_counter() - start
    engine = Engine.from_pretrained(model, settings, device, dtype)
    request = engine.prepare_request(chat, media, prefill_chunk_size)
    request = replace(request, preparation_s=request.preparation_s + loading_s)
    del chat  # the pixels
    progress = prefill_chunk_size is not None and not as_json
    if compare:
        full_engine = Engine(engine.model, engine.processor)
        for either in (full_engine, engine):  # the first calls of a process pay for what later ones share
            either.answer(request, 1, progress=progress, output_logits=True)
        (full,) = full_engine.answer(request, max_new_tokens, progress=progress, output_logits=True)
    (output,) = engine.answer(request, max_new_tokens, progress=progress, output_logits=compare)
    report: dict[str, Any] = {
        "model": model,
        "config": settings.to_dict(),
        "text": output.text,
        "stats": output.stats.to_dict(),
    }
    if compare:
        from mminfer.metrics.fidelity import kl_divergence

        kl = kl_divergence(full.logits[0], output.logits[0]).item()  # type: ignore[index]
        report |= {"uncompressed": {"text": full.text, "stats": full.stats.to_dict()}, "first_token_kl": kl}
    if as_json:
        sys.stdout.write(json.dumps(report) + "\n")
        return
    from mminfer.cli.tables import comparison_table, stats_table
    from mminfer.nano import sample_question

    _out.print(prompt or sample_question(), style="bold", markup=False, highlight=False)
    _out.print(output.text, markup=False)
    if compare:
        _out.print("[dim]uncompressed:[/]", end=" ")
        _out.print(full.text, markup=False)
        _out.print(comparison_table(output.stats, full.stats, kl))
    _out.print(stats_table(output.stats))


@app.command()
@told_plainly
def doctor() -> None:
    """What this machine has, which backend each op takes, and which families and presets there are."""
    import mminfer_kernels
    import torch
    import transformers
    from mminfer_kernels import build, status

    from mminfer.config import PRESETS
    from mminfer.models.registry import supported_families

    table = Table(title="mminfer doctor", title_justify="left", show_header=False)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    rows = {
        "python": platform.python_version(),
        "torch": f"{torch.__version__}, {torch.get_num_threads()} threads",
        "transformers": transformers.__version__,
        "gpu": gpu,
        "triton": status.triton_status(),
        "native kernels": build.status(),
        "families": ", ".join(supported_families()),
        "presets": ", ".join(PRESETS),
    }
    for name, value in rows.items():
        table.add_row(name, value)
    _out.print(table)
    ops = Table(title="what each op runs with", title_justify="left")
    for column in ("op", "device", "backend", "why"):
        ops.add_column(column)
    for op in mminfer_kernels.OPS:
        for choice in status.choices(op):
            ops.add_row(*choice)
    _out.print(ops)


def main() -> None:
    """Entry point: library warnings as single lines."""
    warnings.showwarning = lambda message, *_, **__: _err.print(
        f"warning: {message}", style="yellow", markup=False, highlight=False
    )
    app()
