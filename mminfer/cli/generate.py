"""The command line: mminfer generate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from mminfer.cli import options
from mminfer.cli.console import OUT, print_json, reports_errors
from mminfer.cli.messages import check_messages, request_messages
from mminfer.cli.settings import request_settings

if TYPE_CHECKING:
    from mminfer.engine import Engine
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
        int | None, typer.Option(min=1, help="Leave out frames of a video that takes more visual tokens than these.")
    ] = None,
    allow_remote: options.AllowRemote = False,
    device: options.Device = None,
    dtype: options.Dtype = None,
) -> None:
    """Answer a question about images or a video, and say what that took."""
    settings = request_settings(preset, config, delta)
    messages = request_messages(model, prompt, image or [], video or [], frames, images_from)
    media: dict[str, Any] = {"num_frames": num_frames, "fps": fps, "allow_remote": allow_remote}
    check_messages(messages, media, lazy=prefill_chunk_size is not None)
    from mminfer.engine import Engine  # the heavy imports come after the cheap checks

    engine = Engine.from_pretrained(model, settings, device, dtype)
    chunks = {"prefill_chunk_size": prefill_chunk_size, "progress": prefill_chunk_size is not None and not as_json}
    kwargs = {"max_new_tokens": max_new_tokens, **media, "max_video_tokens": max_video_tokens, **chunks}
    answers = _compared(engine, messages, kwargs) if compare else _Answers(_answer(engine, messages, kwargs))
    if as_json:
        print_json({"model": model, "config": settings.to_dict(), **answers.to_dict()})
    else:
        _print_answers(prompt, answers)


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


def _answer(engine: Engine, messages: list[dict[str, Any]], kwargs: dict[str, Any]) -> GenerationOutput:
    (output,) = cast("list[GenerationOutput]", engine.generate([messages], **kwargs))
    return output


def _compared(engine: Engine, messages: list[dict[str, Any]], kwargs: dict[str, Any]) -> _Answers:
    """Answers without the settings and with them."""
    from mminfer.engine import Engine
    from mminfer.metrics.fidelity import kl_divergence

    full_engine, kwargs = Engine(engine.model, engine.processor), {**kwargs, "output_logits": True}
    for either in (full_engine, engine):  # the first calls of a process pay for what later ones share
        _answer(either, messages, {**kwargs, "max_new_tokens": 1})
    full, output = (_answer(either, messages, kwargs) for either in (full_engine, engine))
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
