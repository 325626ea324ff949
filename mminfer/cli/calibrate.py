"""The command line: mminfer calibrate."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mminfer.cli import options
from mminfer.cli.console import OUT, check_writable, print_json, reports_errors
from mminfer.errors import InputError

if TYPE_CHECKING:
    from mminfer.calibration import Calibration

DRAWN = 16  # contexts, where nano brings its own
KINDS = 4  # of questions about them


@reports_errors
def calibrate(
    model: options.Model = "nano",
    samples: Annotated[
        Path | None,
        typer.Option(
            help='Read the samples from this file of JSON lines: {"prompt": "...", "images": ["a.png"]} or '
            '{"messages": [...]}; paths are told from its folder.'
        ),
    ] = None,
    image: Annotated[
        list[str] | None, typer.Option(help="Ask every question about this image file; repeat the option for more.")
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option(help="Ask this question about every image; repeat the option for more.")
    ] = None,
    images: Annotated[
        int, typer.Option(min=1, max=options.MOST_PICTURES, help="With nano and no files, draw so many a context.")
    ] = 8,
    contexts: Annotated[
        int, typer.Option(min=4, max=options.MOST_PICTURES, help="With nano and no files, draw so many contexts.")
    ] = DRAWN,
    kl: Annotated[
        float, typer.Option(help="Allow so many nats of mean KL divergence to the uncompressed model's answers.")
    ] = 0.05,
    target: Annotated[str, typer.Option(help="Make this less: latency, flops or cache.")] = "latency",
    protocol: Annotated[
        list[str] | None,
        typer.Option(help="Keep the promise in-prompt, next-turn, or both: repeat the option. By default: in-prompt."),
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Force so many tokens of each answer at most.")] = 16,
    held_out: Annotated[float, typer.Option(help="Hold out this fraction of the samples to check with.")] = 0.5,
    confidence: Annotated[float, typer.Option(help="Be so sure of the promise.")] = 0.95,
    seed: Annotated[int, typer.Option(min=0, help="Split the samples, and draw contexts, by this seed.")] = 0,
    out: Annotated[
        Path,
        typer.Option(
            help="Write the settings to this file. What was measured stands in a file beside it (.part) until then, so "
            "that the same command goes on where it was stopped."
        ),
    ] = Path("settings.json"),
    keep: Annotated[
        bool, typer.Option("--keep", help="Leave the .part file there, for another --kl or --target of these samples.")
    ] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw what was found, and write the picture here.")] = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    as_json: options.AsJson = False,
) -> None:
    """Find the cheapest settings whose loss on your samples stays below a bound, and write them to a file."""
    check_writable(out, "--out")
    check_writable(plot, "--plot")
    chats = _given(samples, image or [], prompt or []) or drawn_chats(model, images, contexts, seed)
    from mminfer.calibration import Plan, checked_request  # the heavy imports come after the cheap checks
    from mminfer.calibration import calibrate as run
    from mminfer.engine import Engine

    checked_request(kl, target)

    if plot is not None:
        from mminfer.bench.plots import check_drawable

        check_drawable(plot)
    state = out.with_name(f"{out.name}.part")
    plan = Plan(tuple(protocol or ["in-prompt"]), tokens, held_out, confidence, seed, state, keep)
    engine = Engine.from_pretrained(model, None, device, dtype)
    found = run(engine, chats, kl, target, not as_json, plan)
    found.save(out)
    if plot is not None:
        from mminfer.calibration.pictures import draw

        draw(found, plot)
    _report(found, out, plot, as_json)


def _given(samples: Path | None, image: Sequence[str], prompt: Sequence[str]) -> list[Any] | None:
    """The user's samples as chats: of a file, or of images with questions; None: there are none."""
    if samples is not None:
        if image or prompt:
            raise InputError("--samples beside --image or --prompt: pass one or the other")
        from mminfer.calibration.samples import read_samples

        return read_samples(samples)
    if not image and not prompt:
        return None
    if not image or not prompt:
        missing = "--prompt TEXT" if image else "--image FILE"
        raise InputError(f"samples are images with questions: pass {missing} as well, or --samples FILE")
    return [
        [{"role": "user", "content": [{"type": "image", "image": path}, {"type": "text", "text": question}]}]
        for path, question in product(image, prompt)
    ]


def drawn_chats(model: str, images: int, contexts: int, seed: int) -> list[Any]:
    """Samples of nano's own, one question about each context, of every kind in turn."""
    from mminfer import nano

    if model != nano.NANO:
        raise InputError("no samples: pass --samples FILE, or --image and --prompt; what you ask is what counts")
    from mminfer.bench.contexts import made_contexts

    made = made_contexts(images, contexts, KINDS, seed, None)
    return [context.chat(context.questions[n % len(context.questions)]) for n, context in enumerate(made)]


def _report(found: Calibration, out: Path, plot: Path | None, as_json: bool) -> None:
    if as_json:
        print_json(found.to_dict() | {"out": str(out)})
        return
    OUT.print(found.told(), markup=False, highlight=False, soft_wrap=True)
    OUT.print(f"{found.facts['seconds']} s; written: {out}", markup=False, highlight=False, soft_wrap=True)
    if plot is not None:
        OUT.print(f"drawn: {plot}", markup=False, highlight=False, soft_wrap=True)
