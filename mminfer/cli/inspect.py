"""The command line: mminfer inspect."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mminfer.cli import options
from mminfer.cli.console import OUT, reports_errors
from mminfer.cli.messages import checked_chat, request_messages
from mminfer.cli.settings import DEFAULT_PRESET, request_settings
from mminfer.errors import InputError

if TYPE_CHECKING:
    from mminfer.inspection import Inspection

PAGE = "index.html"
CALIBRATION = "calibration.png"


@reports_errors
def inspect(
    prompt: options.Prompt = None,
    model: options.Model = "nano",
    image: options.ImageOrBundled = None,
    video: options.Video = None,
    frames: options.Frames = 0,
    preset: options.Preset = None,
    config: options.Config = None,
    delta: options.Delta = None,
    out: Annotated[
        Path,
        typer.Option(help="Write index.html and a PNG file of each image to this folder, which is made if need be."),
    ] = Path("inspection"),
    max_new_tokens: options.MaxNewTokens = 64,
    num_frames: options.NumFrames = 8,
    fps: options.Fps = None,
    allow_remote: options.AllowRemote = False,
    device: options.Device = None,
    dtype: options.Dtype = None,
) -> None:
    """Show what the settings did to a prompt: which patches merged, left or lost their cache entries."""
    settings = request_settings(preset, config, delta)
    messages = request_messages(model, prompt, image or [], video or [], frames)
    from mminfer.inputs.content import MediaOptions

    chat = checked_chat(messages, MediaOptions(allow_remote, num_frames, fps))
    _make_folder(out)
    from mminfer.engine import Engine  # the heavy imports come after the cheap checks
    from mminfer.inspection import inspect_chat

    engine = Engine.from_pretrained(model, settings, device, dtype)
    inspection = inspect_chat(engine, chat, max_new_tokens, name=model)
    title = str(config) if config is not None else preset or DEFAULT_PRESET
    pictures = _write_page(inspection, title if delta is None else f"{title}, delta {delta}", out)
    _print_summary(inspection)
    if config is not None and settings.calibrated_on is not None:
        _draw_calibration(config, out)
    OUT.print(f"{out / PAGE} and {pictures} PNG files beside it", markup=False, highlight=False, soft_wrap=True)


def _make_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {out}: {error.strerror}: wanted a folder that can be made") from error
    if not os.access(out, os.W_OK):
        raise InputError(f"--out {out}: nothing can be written there: wanted a folder of your own")


def _write_page(inspection: Inspection, title: str, out: Path) -> int:
    """Writes the page and a picture of each image; gives the number of pictures."""
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


def _draw_calibration(config: Path, out: Path) -> None:
    """What the calibration of these settings tried, and what each operator is good for, if it can be drawn."""
    from mminfer.calibration import Calibration
    from mminfer.calibration.pictures import draw

    found = Calibration.load(config)
    OUT.print(found.told(), markup=False, highlight=False, soft_wrap=True)
    try:
        draw(found, out / CALIBRATION)
    except InputError as error:  # without matplotlib the page does without
        OUT.print(str(error), style="yellow", markup=False, highlight=False, soft_wrap=True)


def _print_summary(inspection: Inspection) -> None:
    from mminfer.inspection.words import sentences

    OUT.print(inspection.answer, markup=False)
    OUT.print("[dim]uncompressed:[/]", end=" ")
    OUT.print(inspection.full_answer, markup=False)
    for sentence in sentences(inspection):
        OUT.print(f"- {sentence}", markup=False, highlight=False)
    OUT.print(f"KL divergence of the first token: {inspection.first_token_kl:.2e} nats", highlight=False)
