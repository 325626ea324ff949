"""The command line: mminfer generate."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mminfer.cli import options
from mminfer.cli.console import OUT, print_json, reports_errors
from mminfer.cli.messages import checked_chat, request_messages
from mminfer.cli.settings import request_settings

if TYPE_CHECKING:
    from mminfer.config import InferenceConfig
    from mminfer.engine import Engine
    from mminfer.inputs.request import Request
    from mminfer.output import GenerationOutput


@reports_errors
def generate(
    prompt: options.Prompt = None,
    model: options.Model = "nano",
    image: options.ImageOrBundled = None,
    images_from: Annotated[
        str | None,
        typer.Option(
            help="Show the images whose paths stand on the lines of this file, or of the standard input if it is -. "
            "They are read as they are needed."
        ),
    ] = None,
    video: options.Video = None,
    frames: options.Frames = 0,
    preset: options.Preset = None,
    config: options.Config = None,
    delta: options.Delta = None,
    compare: Annotated[bool, typer.Option("--compare", help="Run the uncompressed model beside it.")] = False,
    as_json: options.AsJson = False,
    max_new_tokens: options.MaxNewTokens = 64,
    prefill_chunk_size: options.PrefillChunkSize = None,
    num_frames: options.NumFrames = 8,
    fps: options.Fps = None,
    max_video_tokens: Annotated[
        int | None,
        typer.Option(
            min=1, max=options.MOST_TOKENS, help="Leave out frames of a video that takes more visual tokens than these."
        ),
    ] = None,
    allow_remote: options.AllowRemote = False,
    device: options.Device = None,
    dtype: options.Dtype = None,
) -> None:
    """Answer a question about images or a video, and say what that took."""
    settings = request_settings(preset, config, delta)
    messages = request_messages(model, prompt, image or [], video or [], frames, images_from)
    from mminfer.inputs.content import MediaOptions  # the heavy imports come after the cheap checks

    media = MediaOptions(allow_remote, num_frames, fps, max_video_tokens)
    start = time.perf_counter()
    # What is read in chunks is opened when it is needed, but two runs over a list share what was opened.
    lazy = prefill_chunk_size is not None and (not compare or images_from is not None)
    chat = checked_chat(messages, media, lazy)
    opening_s = time.perf_counter() - start
    from mminfer.engine import Engine
    from mminfer.measured import measured_of

    engine = Engine.from_pretrained(model, settings, device, dtype)
    request = engine.prepare_request(chat, media, prefill_chunk_size)
    request = replace(request, preparation_s=request.preparation_s + opening_s)
    del chat  # and with it the pixels
    progress = prefill_chunk_size is not None and not as_json
    answers = (_compared if compare else _answered)(engine, request, max_new_tokens, progress)
    if as_json:
        known = {"measured": None if (row := measured_of(settings)) is None else asdict(row) | {"kept": row.kept}}
        print_json({"model": model, "config": settings.to_dict(), **known, **answers.to_dict()})
    else:
        _print_answers(prompt, answers)
        _print_measured(settings)


@dataclass(frozen=True)
class _Answers:
    """An answer, and where it was compared that of the uncompressed model with the divergence of the first token."""

    output: GenerationOutput
    full: GenerationOutput | None = None
    first_token_kl: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        found: dict[str, Any] = {"text": self.output.text, "stats": self.output.stats.to_dict()}
        if self.full is not None:
            full = {"text": self.full.text, "stats": self.full.stats.to_dict()}
            found |= {"uncompressed": full, "first_token_kl": self.first_token_kl}
        return found


def _answered(engine: Engine, request: Request, max_new_tokens: int, progress: bool) -> _Answers:
    (output,) = engine.answer(request, max_new_tokens, progress=progress)
    return _Answers(output)


def _compared(engine: Engine, request: Request, max_new_tokens: int, progress: bool) -> _Answers:
    """Answers without the settings and with them."""
    from mminfer.engine import Engine
    from mminfer.metrics.fidelity import kl_divergence

    full_engine = Engine(engine.model, engine.processor)
    for either in (full_engine, engine):  # the first calls of a process pay for what later ones share
        either.answer(request, 1, progress=progress, output_logits=True)
    full, output = (
        either.answer(request, max_new_tokens, progress=progress, output_logits=True)[0]
        for either in (full_engine, engine)
    )
    return _Answers(output, full, kl_divergence(full.logits[0], output.logits[0]).item())  # type: ignore[index]


def _print_answers(prompt: str | None, answers: _Answers) -> None:
    from mminfer.cli.tables import comparison_table, stats_table
    from mminfer.nano import sample_question

    OUT.print(prompt or sample_question(), style="bold", markup=False, highlight=False)
    OUT.print(answers.output.text, markup=False)
    if answers.full is not None:
        OUT.print("[dim]uncompressed:[/]", end=" ")
        OUT.print(answers.full.text, markup=False)
        OUT.print(comparison_table(answers.output.stats, answers.full.stats, answers.first_token_kl))
    OUT.print(stats_table(answers.output.stats))


def _print_measured(settings: InferenceConfig) -> None:
    """What is known of the settings on a real model, in one line."""
    from mminfer.measured import measured_of, sentence

    if settings.calibrated_on is not None:
        OUT.print("calibrated on this model; mminfer bench --settings FILE checks the promise on other samples")
        return
    told, row = sentence(settings), measured_of(settings)
    if told is not None:
        style = "yellow" if row is None or row.fails else None
        if row is None or row.fails:
            told += ", or let one be found that holds there: mminfer calibrate --model PATH --samples FILE"
        OUT.print(told, style=style, markup=False, highlight=False, soft_wrap=True)
