"""The bundled tiny trained vision-language model: the default model and the yardstick of quality."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mminfer.nano.filling import FilledContent

NANO = "nano"


def checkpoint_path() -> Path:
    """Folder of the bundled checkpoint, in Hugging Face format."""
    return Path(__file__).parent / "checkpoint"


def samples_path() -> Path:
    """Folder of the bundled pictures and of `context.json`, which says what they show."""
    return Path(__file__).parent / "samples"


def sample_question() -> str:
    """The question that comes with the bundled context."""
    return str(_context()["question"])


def _context() -> dict[str, Any]:
    context: dict[str, Any] = json.loads((samples_path() / "context.json").read_text(encoding="utf-8"))
    return context


def sample_messages(question: str | None = None, frames: int = 0) -> list[dict[str, Any]]:
    """The bundled context as one user message that ends in a question.

    Args:
        question: what to ask; by default the bundled question, whose answer is in `context.json`.
        frames: pictures without a label or a digit that are spread between the others. They are drawn as they are
            taken, so there may be any number; the content is then no list, but can be gone through again and again.

    Returns:
        One chat: labels, pictures (as paths of PNG files) and facts interleaved, then the question.
    """
    folder, context = samples_path(), _context()
    content: list[dict[str, Any]] = []
    for item in context["items"]:
        content.append({"type": "text", "text": item["text"]})
        if "image" in item:
            content.append({"type": "image", "image": str(folder / item["image"])})
    content.append({"type": "text", "text": question or context["question"]})
    return [{"role": "user", "content": FilledContent(content, frames) if frames else content}]
