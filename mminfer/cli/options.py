"""The options that several commands share, each declared once.

A command names them as the annotations of its parameters, and declares beside them what is its own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

_IMAGE = "Show this image file to the model; repeat the option for more."
_WRITTEN = "which InferenceConfig.to_json() wrote"
MOST_TOKENS = 2**31 - 1  # numbers beyond it are refused here, before a model is loaded
MOST_PICTURES = 100_000  # they are made, and held in memory, before anything is read
MOST_SIDE = 10_000  # pixels
_COMPARE = "repeat the option to compare several."

# The model
Model = Annotated[
    str, typer.Option(help="Load the model from this checkpoint folder or hub name; 'nano' is the bundled model.")
]
Device = Annotated[
    str | None,
    typer.Option(help="Run on this device: cpu, cuda, cuda:1, ... By default it is the GPU if there is one."),
]
Dtype = Annotated[
    str | None, typer.Option(help="Compute in this format: float32, bfloat16, ... On the CPU, float32 is the default.")
]

# One request
Prompt = Annotated[
    str | None, typer.Option(help="Ask this question. By default it is the one that comes with the bundled images.")
]
Image = Annotated[list[str] | None, typer.Option(help=_IMAGE)]
ImageOrBundled = Annotated[
    list[str] | None, typer.Option(help=f"{_IMAGE} With nano, the bundled images are the default.")
]
Video = Annotated[list[str] | None, typer.Option(help="Show this video file to the model; repeat the option for more.")]
Frames = Annotated[
    int,
    typer.Option(
        min=0, max=MOST_PICTURES, help="Spread this many pictures without a label between the bundled images of nano."
    ),
]
Preset = Annotated[
    str | None,
    typer.Option(help="Apply this preset to the request (default: regions); 'mminfer doctor' lists all presets."),
]
Config = Annotated[
    Path | None, typer.Option(help=f"Read the settings from this JSON file, {_WRITTEN}, instead of a preset.")
]
Delta = Annotated[
    str | None, typer.Option(help="Put this V2PE step into the settings: 1/256, ..., or auto for one that fits.")
]
MaxNewTokens = Annotated[int, typer.Option(min=1, max=MOST_TOKENS, help="Generate this many tokens at most.")]
PrefillChunkSize = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=MOST_TOKENS,
        help="Send this many tokens of a prompt through the model at a time; by default all at once.",
    ),
]
NumFrames = Annotated[
    int, typer.Option(min=1, max=MOST_TOKENS, help="Take this many frames of each video, evenly spread.")
]
Fps = Annotated[float | None, typer.Option(help="Take this many frames of each second of a video instead.")]
AllowRemote = Annotated[bool, typer.Option("--allow-remote", help="Allow image URLs to be fetched.")]

# Several settings beside each other
Configs = Annotated[
    list[Path] | None, typer.Option(help=f"Measure the settings in this JSON file, {_WRITTEN}; {_COMPARE}")
]
Deltas = Annotated[
    list[str] | None, typer.Option(help=f"Put this V2PE step into every setting: 1/16, ..., or auto; {_COMPARE}")
]
Seed = Annotated[int, typer.Option(help="Draw the contexts from this seed.")]

# What is printed and written
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
Csv = Annotated[Path | None, typer.Option("--csv", help="Write the rows to this file as well.")]


def presets_option(default: str) -> Any:
    """`--preset` where several settings are compared.

    Args:
        default: what is measured if no setting is named.
    """
    return typer.Option(help=f"Measure this preset; {_COMPARE} By default: {default}.")
