"""Frames of nothing in particular between the parts of a context, drawn as they are taken."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

CHUNK = 64  # frames drawn at once; what they look like depends on it


class FilledContent:
    """A message's content with frames behind its images, about as many behind each; goes through again and again.

    Args:
        content: parts, among them images.
        frames: how many frames there are in all.
        seed: of their textures.
    """

    def __init__(self, content: Sequence[dict[str, Any]], frames: int, seed: int = 0) -> None:
        self._content, self._frames, self._seed = content, frames, seed

    def __len__(self) -> int:
        return len(self._content) + self._frames

    def __iter__(self) -> Iterator[dict[str, Any]]:
        images = sum(part["type"] == "image" for part in self._content)
        pictures, seen = self._pictures(), 0
        for part in self._content:
            yield part
            if part["type"] == "image":
                before, seen = self._frames * seen // images, seen + 1
                for _ in range(self._frames * seen // images - before):
                    yield {"type": "image", "image": next(pictures)}

    def _pictures(self) -> Iterator[Any]:
        import torch
        from PIL import Image

        from mminfer.nano.pictures import draw_backgrounds

        generator = torch.Generator().manual_seed(self._seed)
        while True:
            drawn = draw_backgrounds(CHUNK, generator).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
            yield from (Image.fromarray(pixels.numpy()) for pixels in drawn)
