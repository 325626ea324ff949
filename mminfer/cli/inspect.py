"""The command line: mminfer inspect."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mminfer.cli.asking import request_messages, request_settings
from mminfer.cli.options import OUT, told_plainly
from mminfer.errors import InputError

if TYPE_CHECKING:
    from mminfer.inspection import Inspection

PAGE = "index.html"


@told_plainly
def inspect(
    prompt: Annotated[
        str | None, typer.Option(help="The question. Default: the one that comes with the bundled images.")
    ] = None,
    model: Annotated[str, typer.Option(help="Checkpoint folder or hub name; 'nano' is the bundled model.")] = "nano",
    image: Annotated[
        list[str] | None,
        typer.Option(help="An image file; repeat for more. Default with nano: the bundled ones."),
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
    out: Annotated[
        Path, typer.Option(help="A folder, made if need be: index.html and a PNG of each image go there.")
    ] = Path("inspection"),
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate at most.")] = 64,
    num_frames: Annotated[int, typer.Option(min=1, help="Frames taken of each video.")] = 8,
    fps: Annotated[float | None, typer.Option(help="Take so many frames a second instead.")] = None,
    allow_remote: Annotated[bool, typer.Option("--allow-remote", help="Let image URLs be fetched.")] = False,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, ... Default: float32 on the CPU.")] = None,
) -> None:
    """Show what the settings did to a prompt: which patches merged, left or lost their cache entries."""
    settings = request_settings(preset, config, delta)
    messages = request_messages(model, prompt, image or [], video or [], frames)
    from mminfer.engine import Engine  # the heavy imports come after the cheap checks
    from mminfer.inputs.messages import MediaOptions, normalise_messages
    from mminfer.inspection import inspect_chat

    media: dict[str, Any] = {"num_frames": num_frames, "fps": fps, "allow_remote": allow_remote}
    normalise_messages(messages, MediaOptions(**media))  # before weights are loaded
    _make_folder(out)
    engine = Engine.from_pretrained(model, settings, device, dtype)
    inspection = inspect_chat(engine, messages, max_new_tokens, name=model, **media)
    title = str(config) if config is not None else preset or "balanced"
    pictures = _write(inspection, title if delta is None else f"{title}, delta {delta}", out)
    _tell(inspection)
    OUT.print(f"{out / PAGE} and {pictures} PNG files beside it", markup=False, highlight=False, soft_wrap=True)


def _make_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {out}: {error.strerror}: wanted a folder that can be made") from error
    if not os.access(out, os.W_OK):
        raise InputError(f"--out {out}: nothing can be written there: wanted a folder of your own")


def _write(inspection: Inspection, title: str, out: Path) -> int:
    """The page, and a picture of each image: how many."""
    from mminfer.inspection import draw_image, page_html

    count = len(inspection.images)
    digits = max(3, len(str(count)))
    try:
        for place in range(count):
            draw_image(inspection, place).save(out / f"image-{place + 1:0{digits}}.png")
        (out / PAGE).write_text(page_html(inspection, title), encoding="utf-8")
    except OSError as error:
        raise InputError(f"--out {out}: {error}") from error
    return count


def _tell(inspection: Inspection) -> None:
    from mminfer.inspection.words import sentences

    OUT.print(inspection.answer, markup=False)
    OUT.print("[dim]uncompressed:[/]", end=" ")
    OUT.print(inspection.full_answer, markup=False)
    for sentence in sentences(inspection):
        OUT.print(f"- {sentence}", markup=False, highlight=False)
    OUT.print(f"KL divergence of the first token: {inspection.first_token_kl:.2e} nats", highlight=False)
