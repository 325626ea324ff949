"""kvpress's side of the comparison, run as a file by the Python of its own environment; knows nothing of mminfer.

It does what kvpress's own pipeline does: the context goes through the model with the press on, the question follows at
the positions after the whole context, with the press off.
"""

import copy
import json
import os
import tempfile
import time
from contextlib import nullcontext
from importlib import metadata
from pathlib import Path
from typing import Any

import kvpress
import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText, DynamicCache
from wire import Prompt, read_prompts, serve

state: dict[str, Any] = {}  # "model", "prompts"


def load(checkpoint: str, prompts: str, threads: int) -> dict[str, Any]:
    """Model and prompts; gives the versions of what runs here."""
    torch.set_num_threads(threads)
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        source = checkpoint if int(transformers.__version__.split(".")[0]) >= 5 else older(checkpoint, folder)
        model = AutoModelForImageTextToText.from_pretrained(source, attn_implementation="sdpa").float().eval()
    state.update(model=model, prompts=read_prompts(Path(prompts)))
    return {name: metadata.version(name) for name in ("kvpress", "torch", "transformers")}


def older(checkpoint: str, folder: str) -> str:
    """The checkpoint with its configuration as transformers before 5 spells it, in `folder`."""
    for file in Path(checkpoint).iterdir():
        if file.name != "config.json":
            os.symlink(file.resolve(), Path(folder, file.name))
    config = json.loads(Path(checkpoint, "config.json").read_text())
    rope = config["text_config"].pop("rope_parameters")
    config["text_config"]["rope_theta"] = rope.pop("rope_theta")
    config["text_config"]["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    Path(folder, "config.json").write_text(json.dumps(config))
    return folder


def answer(prompt: int, press: str | None, arguments: dict[str, Any], out: str) -> dict[str, Any]:
    """Logits [questions, answer tokens, vocabulary] where each right answer is foretold, into a file."""
    asked = state["prompts"][prompt]
    cache = read(asked, press, arguments)
    logits = []
    for question, tokens in zip(asked.questions, asked.answers, strict=True):
        own, rows, position = copy.deepcopy(cache), [], len(asked.input_ids)
        for ids in (question, *([token] for token in tokens[:-1])):
            rows.append(forward(own, ids, position))
            position += len(ids)
        logits.append(torch.stack(rows))
    save_file({"logits": torch.stack(logits)}, out)
    return {"tokens": len(asked.input_ids), "entries": entries(cache)}


def decode(prompt: int, press: str | None, arguments: dict[str, Any], steps: int) -> dict[str, Any]:
    """Reads the context, asks its first question and times so many greedy steps."""
    asked = state["prompts"][prompt]
    start = time.perf_counter()
    cache = read(asked, press, arguments)
    read_ms, held = 1e3 * (time.perf_counter() - start), entries(cache)
    position = len(asked.input_ids) + len(asked.questions[0])
    token, step_ms = int(forward(cache, asked.questions[0], len(asked.input_ids)).argmax()), []
    for step in range(steps):
        start = time.perf_counter()
        token = int(forward(cache, [token], position + step).argmax())
        step_ms.append(1e3 * (time.perf_counter() - start))
    return {"tokens": len(asked.input_ids), "entries": held, "read_ms": read_ms, "step_ms": step_ms}


@torch.no_grad()
def read(asked: Prompt, press: str | None, arguments: dict[str, Any]) -> Any:
    """The cache of the context, compressed while it is filled."""
    cache, model = DynamicCache(), state["model"]
    with nullcontext() if press is None else getattr(kvpress, press)(**arguments)(model):
        ids = torch.tensor([asked.input_ids])
        model.model(input_ids=ids, pixel_values=asked.pixel_values, past_key_values=cache)
    return cache


@torch.no_grad()
def forward(cache: Any, ids: list[int], position: int) -> torch.Tensor:
    """Logits [vocabulary] behind these tokens, of which the first has this position."""
    positions = torch.arange(position, position + len(ids))[None]
    inputs = {"input_ids": torch.tensor([ids]), "position_ids": positions, "past_key_values": cache}
    logits: torch.Tensor = state["model"](**inputs, logits_to_keep=1).logits[0, -1]
    return logits


def entries(cache: Any) -> float:
    """Held a head, mean over the layers."""
    lengths = [layer.keys.shape[2] for layer in cache.layers]
    return sum(lengths) / len(lengths)


if __name__ == "__main__":
    serve({"load": load, "answer": answer, "decode": decode})
