"""What passes between a comparison and a peer's process: prompts as files, commands and replies as lines of JSON.

Imported on both sides: by the project, and by workers in a peer's own environment. It needs torch and safetensors.
"""

import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

MOST_OF_AN_ERROR = 200  # characters of its first sentence: it becomes a cell of a table


@dataclass(frozen=True)
class Prompt:
    """A context and what is asked about it, as token ids.

    Args:
        input_ids: of the context, up to the place in the user's turn where a question follows.
        pixel_values: [pictures, 3, height, width], as the model takes them.
        questions: token ids of each, with the marks that end the user's turn and begin the answer.
        answers: token ids of the right answer to each, the mark that ends it included.
        kinds: of question.
    """

    input_ids: list[int]
    pixel_values: torch.Tensor
    questions: list[list[int]]
    answers: list[list[int]]
    kinds: list[str]


def save_prompts(prompts: list[Prompt], folder: Path) -> None:
    """Writes prompts.safetensors, the pixels by number of prompt, and prompts.json, the rest."""
    save_file({str(n): p.pixel_values.contiguous() for n, p in enumerate(prompts)}, folder / "prompts.safetensors")
    rest = [{k: v for k, v in asdict(p).items() if k != "pixel_values"} for p in prompts]
    (folder / "prompts.json").write_text(json.dumps(rest))


def read_prompts(folder: Path) -> list[Prompt]:
    """What `save_prompts` wrote."""
    pixels = load_file(folder / "prompts.safetensors")
    rest = json.loads((folder / "prompts.json").read_text())
    return [Prompt(pixel_values=pixels[str(n)], **fields) for n, fields in enumerate(rest)]


def serve(commands: Mapping[str, Callable[..., dict[str, Any]]]) -> None:
    """Answers commands, {"command": name, argument: value, ...} a line, until there are no more.

    The reply is what the command gives, or {"error": what it raised}. Whatever libraries print goes to stderr.
    """
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        arguments = json.loads(line)
        try:
            reply = commands[arguments.pop("command")](**arguments)
        except Exception as error:
            first = next(iter(str(error).strip().splitlines()), "").split(". ")[0]
            reply = {"error": f"{type(error).__name__}: {first[:MOST_OF_AN_ERROR]}"}
        print(json.dumps(reply), file=replies, flush=True)
