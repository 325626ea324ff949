"""What settings are measured on: a user's own images, or contexts drawn on the spot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mminfer.errors import InputError


@dataclass(frozen=True)
class Context:
    """A context and questions about it.

    Args:
        content: parts of the user's message.
        questions: each is asked on its own.
    """

    content: tuple[dict[str, Any], ...]
    questions: tuple[str, ...]

    def chat(self, question: str) -> list[dict[str, Any]]:
        """Context and question as one chat."""
        return [{"role": "user", "content": [*self.content, {"type": "text", "text": question}]}]


def own_context(images: Sequence[str], videos: Sequence[str], prompt: str | None) -> Context:
    """The files of a user.

    Raises:
        InputError: there is no question.
    """
    if prompt is None or not prompt.strip():
        raise InputError("no question about these files: pass --prompt TEXT")
    parts = [{"type": "image", "image": path} for path in images]
    return Context((*parts, *({"type": "video", "video": path} for path in videos)), (prompt,))


def made_contexts(images: int, count: int, questions: int, seed: int, picture_size: int | None) -> list[Context]:
    """Labelled pictures of handwritten digits and text facts, a pure function of the arguments.

    Args:
        images: pictures in a context.
        count: contexts.
        questions: of each context at most, evenly spread over all kinds.
        seed: of the contexts.
        picture_size: pixels a side; None: the bundled model's.

    Raises:
        InputError: such contexts cannot be made.
    """
    from mminfer.needle.labels import Labels
    from mminfer.needle.pictures import check_available
    from mminfer.needle.protocol import DEPTHS

    check_available()
    sized = {} if picture_size is None else {"picture_size": picture_size}
    depths = DEPTHS if images >= len(DEPTHS) else tuple(n / max(1, images - 1) for n in range(images))
    protocol = Labels(depths=depths, **sized)
    protocol.check(images)
    made = []
    for sample in protocol.samples(images, count, seed):
        step = max(1, len(sample.questions) // questions)
        chosen = tuple(question.text for question in sample.questions[::step][:questions])
        made.append(Context(tuple(sample.content(False)), chosen))
    return made
