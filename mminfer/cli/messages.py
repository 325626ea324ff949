"""The chat that the options of a request describe."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mminfer.errors import InputError

if TYPE_CHECKING:
    from mminfer.inputs.content import MediaOptions


def request_messages(
    model: str, prompt: str | None, images: list[str], videos: list[str], frames: int, images_from: str | None = None
) -> list[dict[str, Any]]:
    """The chat of a request; with nano and no media the bundled one.

    Args:
        model: its name.
        prompt: the question; None: the bundled one.
        images: paths or URLs.
        videos: likewise.
        frames: so many pictures without a label between the bundled ones.
        images_from: a file with the path of an image on each line.

    Raises:
        InputError: there is no question, or these do not go together.
    """
    from mminfer import nano

    media: list[dict[str, Any]] = [{"type": "image", "image": path} for path in images]
    if images_from is not None:
        media.append({"type": "images", "images": ListedPaths(images_from)})
    media += [{"type": "video", "video": path} for path in videos]
    bundled = model == nano.NANO and not media
    if frames and not bundled:
        raise InputError(f"--frames {frames}: they go between the bundled images of nano: leave other media out")
    if bundled and prompt is None:
        return nano.sample_messages(frames=frames)
    if prompt is None or not prompt.strip():
        raise InputError("no question: pass --prompt TEXT")
    if bundled:
        return nano.sample_messages(prompt, frames)
    return [{"role": "user", "content": [*media, {"type": "text", "text": prompt}]}]


def checked_chat(messages: list[dict[str, Any]], media: MediaOptions, lazy: bool = False) -> Any:
    """The chat, checked before the weights of a model are loaded, which may take minutes.

    Args:
        messages: the chat.
        media: how images and videos are taken.
        lazy: the parts of the last message are opened while they are read, not now.

    Returns:
        What an engine takes in place of the messages; it does not check or open again what was.

    Raises:
        InputError: a part or a file of it is wrong.
    """
    from mminfer.inputs.messages import normalise_messages, parse_chat

    return parse_chat(messages, media) if lazy else normalise_messages(messages, media)


class ListedPaths:
    """The lines of a file, or of the standard input, one by one; remembered for the next time.

    Args:
        path: of the file; "-": the standard input.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._lines: list[str] | None = None
        if path != "-" and not Path(path).is_file():
            raise InputError(f"--images-from {path}: no such file: wanted one with the path of an image on each line")

    def __iter__(self) -> Iterator[str]:
        if self._lines is not None:
            yield from self._lines
            return
        read = []
        try:
            for line in self._opened():
                read.append(line)
                yield line
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"--images-from {self._path}: {error}: wanted paths of images in UTF-8") from error
        if not read:
            raise InputError(f"--images-from {self._path}: no path in it: wanted one of an image on each line")
        self._lines = read

    def _opened(self) -> Iterator[str]:
        if self._path == "-" and sys.stdin is None:
            raise InputError("--images-from -: the standard input is closed: pass a file")
        with nullcontext(sys.stdin) if self._path == "-" else Path(self._path).open(encoding="utf-8") as lines:
            yield from filter(None, map(str.strip, lines))
