"""The bundled tiny trained vision-language model: the default model and the yardstick of quality."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

NANO = "nano"


def checkpoint_path() -> Path:
    """Folder of the bundled checkpoint, in Hugging Face format."""
    return Path(__file__).parent / "checkpoint"


def samples_path() -> Path:
    """Folder of the bundled pictures and of `context.json`, which says what they show."""
    return Path(__file__).parent / "samples"


def sample_messages(question: str | None = None) -> list[dict[str, Any]]:
    """The bundled context as one user message that ends in a question.

    Args:
        question: what to ask; by default the bundled question, whose answer is in `context.json`.

    Returns:
        One chat: labels, pictures (as paths of PNG files) and facts interleaved, then the question.
    """
    folder = samples_path()
    context = json.loads((folder / "context.json").read_text(encoding="utf-8"))
    content: list[dict[str, Any]] = []
    for item in context["items"]:
        content.append({"type": "text", "text": item["text"]})
        if "image" in item:
            content.append({"type": "image", "image": str(folder / item["image"])})
    content.append({"type": "text", "text": question if question is not None else context["question"]})
    return [{"role": "user", "content": content}]
